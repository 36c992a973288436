"""Runs whose updates another run makes are what they would be by themselves, bit for bit, whatever happens."""

from __future__ import annotations

import json
import shutil

import pytest

from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import CollapseError, Interrupted
from qtdog.data.dataset import DomainSubset
from qtdog.data.digits import RotatedDigits
from qtdog.runs.folder import RunFolder
from qtdog.training import loop as loop_module
from qtdog.training import run as run_module
from qtdog.training.averagers import AVERAGERS
from qtdog.training.checkpoint import checkpoint_folders
from qtdog.training.collapse import HealthWatch
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.shared_updates import SharedRun, may_share_updates

START, STEPS = 3, 8
AVERAGED = [name for name in AVERAGERS if name != "none"]


@pytest.fixture(scope="module")
def digits():
    return DomainSubset(RotatedDigits(), ["0", "15", "75"])


@pytest.fixture(scope="module")
def make(digits):
    """Return a function that makes the resolved configuration of eight steps with an averager."""

    def config(averager="none", quantizer="lsq", **changes):
        base = {
            "data": {"target": "75", "batch_size": 4, "image_size": 8},
            "train": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 1},
            "quantizer": {"name": quantizer, "start_step": START if quantizer == "lsq" else None},
            "averager": {"name": averager, "params": {"start": START + 1} if averager == "sma" else {}},
        }
        return resolve(build_config([load_preset("digits"), base, changes]), digits)

    return config


def measured(folder: RunFolder) -> tuple[str, list[dict]]:
    result = folder.read_result()
    assert result is not None
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return result["model_sha256"], [line | {"trained_s": 0} for line in lines]


@pytest.fixture(scope="module")
def alone(make, digits, tmp_path_factory):
    """Return a function that gives what a configuration comes to by itself."""
    known = {}

    def outcome(config):
        text = config.model_dump_json()
        if text not in known:
            folder = RunFolder(tmp_path_factory.mktemp("alone") / "run")
            run(config, digits, folder)
            known[text] = measured(folder)
        return known[text]

    return outcome


class Party:
    """A run and its companions in one folder."""

    def __init__(self, path, lead, *others):
        self.lead, self.folder = lead, RunFolder(path / "lead")
        self.companions = [SharedRun(config, RunFolder(path / config.averager.name)) for config in others]

    def train(self, digits, **how):
        run(self.lead, digits, self.folder, resume=True, companions=self.companions, **how)

    def write_result(self, digits):
        """Finish the companions and return how many updates they had to make."""
        made = 0
        for one in self.companions:
            saved = checkpoint_folders(one.folder.checkpoints)
            made += STEPS - (int(saved[-1].name.removeprefix("step-")) if saved else 0)
            run(one.config, digits, one.folder, resume=True)
        return made

    def check(self, alone):
        assert measured(self.folder) == alone(self.lead)
        for one in self.companions:
            assert measured(one.folder) == alone(one.config), one.config.averager.name


class Stops:
    """`update` that is interrupted before it has been called so often."""

    def __init__(self, n, error):
        self.n, self.error, self.original = n, error, loop_module.update

    def __call__(self, *given):
        if self.n == 0:
            raise self.error
        self.n -= 1
        return self.original(*given)


@pytest.mark.parametrize("lead", ["none", "sma"])
@pytest.mark.parametrize("quantizer", ["none", "lsq"])
def test_companions_with_every_averager_are_bit_identical(quantizer, lead, make, digits, alone, tmp_path):
    names = ["none", *AVERAGED]
    party = Party(tmp_path, make(lead, quantizer), *(make(name, quantizer) for name in names if name != lead))
    party.train(digits)
    assert party.write_result(digits) == 0
    party.check(alone)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_batch_norm_measured_for_an_average_is_not_left_to_the_others(freeze_bn, make, digits, alone, tmp_path):
    changes = {"model": {"backbone": "test_resnet", "weights": "none", "freeze_bn": freeze_bn}}
    party = Party(tmp_path, make("none", "none", **changes), make("sma", "none", **changes))
    party.train(digits)
    assert party.write_result(digits) == 0
    party.check(alone)


def test_a_fork_takes_its_companions_along(make, digits, alone, tmp_path):
    prefix = train_fork_point(make(), digits, RunFolder(tmp_path / "prefix"))
    party = Party(tmp_path, make(), make("sma"), make("swad"))
    party.train(digits, fork_from=prefix)
    assert party.write_result(digits) == 0
    party.check(alone)
    results = [one.folder.read_result() or {} for one in party.companions]
    assert [result["forked_from_step"] for result in results] == [START, START]


@pytest.mark.parametrize("error", [Interrupted("stop"), KeyboardInterrupt()])
@pytest.mark.parametrize("n", [0, 2, 5])
def test_stopped_together_and_resumed_together(n, error, make, digits, alone, tmp_path, monkeypatch):
    party = Party(tmp_path, make(), make("sma"), make("swad"))
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "update", Stops(n, error))
        with pytest.raises(type(error)):
            party.train(digits)
    party.train(digits)
    assert party.write_result(digits) == 0
    party.check(alone)


def test_killed_between_two_saves_all_go_on_from_the_step_that_all_have(make, digits, alone, tmp_path, monkeypatch):
    party, original = Party(tmp_path, make(), make("sma")), run_module.save_state

    def die(parts, folder, state):
        if folder.path.name == "lead" and state.step == 5:
            raise KeyboardInterrupt  # nothing is saved any more, as after a kill
        original(parts, folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_state", die)
        with pytest.raises(KeyboardInterrupt):
            party.train(digits)
    assert [checkpoint_folders(RunFolder(tmp_path / name).checkpoints)[-1].name for name in ("lead", "sma")] == [
        "step-00000004",
        "step-00000005",
    ]
    party.train(digits)
    assert party.write_result(digits) == 0
    party.check(alone)


def test_who_stands_elsewhere_trains_by_itself(make, digits, alone, tmp_path, monkeypatch):
    party = Party(tmp_path, make(), make("sma"), make("swad"))
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "update", Stops(4, Interrupted("stop")))
        with pytest.raises(Interrupted):
            party.train(digits)
    shutil.rmtree(tmp_path / "sma")
    party.train(digits)
    assert party.write_result(digits) == STEPS
    party.check(alone)


def test_who_came_to_other_weights_stays_out(make, digits, tmp_path, monkeypatch):
    party = Party(tmp_path, make(), make("sma"))
    other = make(train={"seed": 1, "steps": STEPS, "eval_every": 2, "checkpoint_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "update", Stops(4, Interrupted("stop")))
        with pytest.raises(Interrupted):
            party.train(digits)
        patch.setattr(loop_module, "update", Stops(4, Interrupted("stop")))
        with pytest.raises(Interrupted):
            run(other, digits, RunFolder(tmp_path / "other"))
    shutil.rmtree(party.folder.checkpoints)
    shutil.copytree(tmp_path / "other" / "checkpoint", party.folder.checkpoints)
    party.train(digits)
    assert party.write_result(digits) == STEPS - 4


def test_who_is_held_by_another_process_or_of_another_run_is_named(make, digits, alone, tmp_path):
    party, told = Party(tmp_path, make(), make("sma"), make("swad")), []
    (tmp_path / "swad").mkdir()
    (tmp_path / "swad" / "notes.txt").write_text("mine")
    with party.companions[0].folder.lock():
        party.train(digits, callbacks=RunCallbacks(warn=told.append))
    assert measured(party.folder) == alone(make())
    assert len(told) == 2
    assert "sma trains by itself: run folder" in told[0]
    assert "swad trains by itself" in told[1]
    assert "holds no run" in told[1]


def test_a_companion_that_collapses_stops_nobody_else(make, digits, alone, tmp_path, monkeypatch):
    party = Party(tmp_path, make(), make("sma"), make("swad"))

    def collapse(self, layers, records):
        if self.config.averager.name == "sma" and records[-1].step == 6:
            raise CollapseError("gone", {})

    with monkeypatch.context() as patch:
        patch.setattr(HealthWatch, "__call__", collapse)
        party.train(digits)
        assert measured(party.folder) == alone(make())
        with pytest.raises(CollapseError):
            party.write_result(digits)
    assert party.write_result(digits) == 2  # it went back to its last checkpoint, and kept that of the collapse
    party.check(alone)


def test_only_the_averager_may_differ(make):
    assert may_share_updates(make(), make("sma"))
    assert not may_share_updates(make(), make("sma", train={"seed": 1, "steps": STEPS}))
    assert not may_share_updates(make(), make("sma", "none"))


def test_a_run_that_differs_in_more_is_not_taken_along(make, digits, alone, tmp_path):
    party, told = Party(tmp_path, make(), make("sma", "none")), []
    party.train(digits, callbacks=RunCallbacks(warn=told.append))
    assert "sma trains by itself: it differs in more than the averager" in told[0]
    assert measured(party.folder) == alone(make())
