"""Runs whose updates another run makes are what they would be by themselves, bit for bit, whatever happens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import CollapseError, Interrupted
from qtdog.core.progress import RunCallback, StopAfter
from qtdog.runs.folder import RunFolder
from qtdog.training.averagers import AVERAGERS
from qtdog.training.build import build_components
from qtdog.training.checkpoint import checkpoint_folders
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.shared_updates import SharedRun, may_share_updates, open_shared_runs

START, STEPS = 3, 8
AVERAGED = [name for name in AVERAGERS if name != "none"]


@pytest.fixture(scope="module")
def make(three_digits):
    """Return a function that makes the resolved configuration of eight steps with an averager."""

    def config(averager="none", quantizer="lsq", **changes):
        base = {
            "data": {"target": "75", "batch_size": 4, "image_size": 8},
            "train": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 1},
            "quantizer": {"name": quantizer, "start_step": START if quantizer == "lsq" else None},
            "averager": {"name": averager, "params": {"start": START + 1} if averager == "sma" else {}},
        }
        return resolve(build_config([load_preset("digits"), base, changes]), three_digits)

    return config


def measured(folder: RunFolder) -> tuple[str, list[dict]]:
    result = folder.read_result()
    assert result is not None
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return result["model_sha256"], [line | {"trained_s": 0} for line in lines]


@pytest.fixture(scope="module")
def alone(make, three_digits, tmp_path_factory):
    """Return a function that gives what a configuration comes to by itself."""
    known = {}

    def outcome(config):
        text = config.model_dump_json()
        if text not in known:
            folder = RunFolder(tmp_path_factory.mktemp("alone") / "run")
            run(config, three_digits, folder)
            known[text] = measured(folder)
        return known[text]

    return outcome


class SharedTraining:
    """A run and those that share its updates, in one folder."""

    def __init__(self, path, lead, *others):
        self.lead, self.folder = lead, RunFolder(path / "lead")
        self.followers = [SharedRun(config, RunFolder(path / config.averager.name)) for config in others]

    def train(self, three_digits, **more):
        run(self.lead, three_digits, self.folder, resume=True, shared_runs=self.followers, **more)

    def write_result(self, three_digits, **more):
        """Finish the followers and return how many updates they had to make."""
        made = 0
        for one in self.followers:
            saved = checkpoint_folders(one.folder.checkpoints)
            made += STEPS - (int(saved[-1].name.removeprefix("step-")) if saved else 0)
            run(one.config, three_digits, one.folder, resume=True, **more)
        return made

    def check(self, alone):
        assert measured(self.folder) == alone(self.lead)
        for one in self.followers:
            assert measured(one.folder) == alone(one.config), one.config.averager.name


class StopWith(StopAfter):
    """Stop with another error, as Ctrl-C outside of a run's own handler does: nothing is saved."""

    def on_step(self, step, loss, n_images):
        try:
            super().on_step(step, loss, n_images)
        except Interrupted as error:
            raise KeyboardInterrupt from error


class DieBeforeSaving(RunCallback):
    """End the process between the checkpoints of the runs that follow and that of the run that trains."""

    def on_save(self, step):
        if step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lead", ["none", "sma"])
@pytest.mark.parametrize("quantizer", ["none", "lsq"])
def test_runs_with_every_averager_are_bit_identical(quantizer, lead, make, three_digits, alone, tmp_path):
    names = ["none", *AVERAGED]
    shared = SharedTraining(tmp_path, make(lead, quantizer), *(make(name, quantizer) for name in names if name != lead))
    shared.train(three_digits)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_batch_norm_measured_for_an_average_does_not_reach_the_others(freeze_bn, make, three_digits, alone, tmp_path):
    changes = {"model": {"backbone": "test_resnet", "weights": "none", "freeze_bn": freeze_bn}}
    shared = SharedTraining(tmp_path, make("none", "none", **changes), make("sma", "none", **changes))
    shared.train(three_digits)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)


def test_runs_follow_a_run_that_begins_from_a_fork_point(make, three_digits, alone, tmp_path):
    prefix = train_fork_point(make(), three_digits, RunFolder(tmp_path / "prefix"))
    shared = SharedTraining(tmp_path, make(), make("sma"), make("swad"))
    shared.train(three_digits, fork_from=prefix)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)
    results = [one.folder.read_result() or {} for one in shared.followers]
    assert [result["forked_from_step"] for result in results] == [START, START]


@pytest.mark.parametrize("kind", [StopAfter, StopWith])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_stopped_together_and_resumed_together(n, kind, make, three_digits, alone, tmp_path):
    shared = SharedTraining(tmp_path, make(), make("sma"), make("swad"))
    with pytest.raises(KeyboardInterrupt if kind is StopWith else Interrupted):
        shared.train(three_digits, callbacks=RunCallbacks(kind(n)))
    shared.train(three_digits)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)


def test_killed_between_two_saves_all_go_on_from_the_step_that_all_have(make, three_digits, alone, tmp_path):
    shared = SharedTraining(tmp_path, make(), make("sma"))
    with pytest.raises(KeyboardInterrupt):
        shared.train(three_digits, callbacks=RunCallbacks(DieBeforeSaving()))
    assert [checkpoint_folders(RunFolder(tmp_path / name).checkpoints)[-1].name for name in ("lead", "sma")] == [
        "step-00000004",
        "step-00000005",
    ]
    shared.train(three_digits)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)


def test_a_run_at_another_step_is_skipped(make, three_digits, alone, tmp_path):
    shared = SharedTraining(tmp_path, make(), make("sma"), make("swad"))
    with pytest.raises(Interrupted):
        shared.train(three_digits, callbacks=RunCallbacks(StopAfter(4)))
    shutil.rmtree(tmp_path / "sma")
    shared.train(three_digits)
    assert shared.write_result(three_digits) == STEPS
    shared.check(alone)


def test_a_run_with_other_weights_is_skipped(make, three_digits, tmp_path):
    shared = SharedTraining(tmp_path, make(), make("sma"))
    other = make(train={"seed": 1, "steps": STEPS, "eval_every": 2, "checkpoint_every": 1})
    with pytest.raises(Interrupted):
        shared.train(three_digits, callbacks=RunCallbacks(StopAfter(4)))
    with pytest.raises(Interrupted):
        run(other, three_digits, RunFolder(tmp_path / "other"), callbacks=RunCallbacks(StopAfter(4)))
    shutil.rmtree(shared.folder.checkpoints)
    shutil.copytree(tmp_path / "other" / "checkpoint", shared.folder.checkpoints)
    shared.train(three_digits)
    assert shared.write_result(three_digits) == STEPS - 4


def test_a_locked_or_foreign_folder_is_named_and_skipped(make, three_digits, alone, tmp_path):
    shared, told = SharedTraining(tmp_path, make(), make("sma"), make("swad")), []
    (tmp_path / "swad").mkdir()
    (tmp_path / "swad" / "notes.txt").write_text("mine")
    with shared.followers[0].folder.lock():
        shared.train(three_digits, callbacks=RunCallbacks(warn=told.append))
    assert measured(shared.folder) == alone(make())
    assert len(told) == 2
    assert "sma trains by itself: run folder" in told[0]
    assert "swad trains by itself" in told[1]
    assert "holds no run" in told[1]


def sma_collapses(components, warn):
    """Return a check of health by which the run with a moving average falls to chance at step 6."""

    def collapse(layers, records):
        if components.config.averager.name == "sma" and records[-1].step == 6:
            raise CollapseError("gone", {})

    return collapse


def test_a_run_that_collapses_does_not_stop_the_others(make, three_digits, alone, tmp_path):
    shared = SharedTraining(tmp_path, make(), make("sma"), make("swad"))
    collapsing = RunCallbacks(make_health_check=sma_collapses)
    shared.train(three_digits, callbacks=collapsing)
    assert measured(shared.folder) == alone(make())
    with pytest.raises(CollapseError):
        shared.write_result(three_digits, callbacks=collapsing)
    assert shared.write_result(three_digits) == 2  # it went back to its last checkpoint, and kept that of the collapse
    shared.check(alone)


def test_of_several_processes_only_the_first_one_locks_and_claims(make, three_digits, tmp_path):
    config, folder = make("sma"), RunFolder(tmp_path / "sma")
    components = build_components(make(), three_digits)
    second = replace(components, accelerator=SimpleNamespace(is_main_process=False, num_processes=1))
    with folder.lock(), open_shared_runs([SharedRun(config, folder)], second, 0, pytest.fail):
        pass  # the lock of the first process does not trouble the second, which writes nothing
    assert [path.name for path in folder.path.iterdir()] == [".lock"]


def test_only_the_averager_may_differ(make):
    assert may_share_updates(make(), make("sma"))
    assert not may_share_updates(make(), make("sma", train={"seed": 1, "steps": STEPS}))
    assert not may_share_updates(make(), make("sma", "none"))


def test_a_run_that_differs_in_more_is_skipped(make, three_digits, alone, tmp_path):
    shared, told = SharedTraining(tmp_path, make(), make("sma", "none")), []
    shared.train(three_digits, callbacks=RunCallbacks(warn=told.append))
    assert "sma trains by itself: it differs in more than the averager" in told[0]
    assert measured(shared.folder) == alone(make())
