"""Runs from fork points, and runs whose updates another makes, are what they would be by themselves, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qtdog.conversion.attach import sites
from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import CollapseError, ConfigError, Interrupted, RunError
from qtdog.core.progress import RunCallback, StopAfter
from qtdog.quantizers.registry import QUANTIZERS, works_after_training
from qtdog.runs.folder import RunFolder
from qtdog.training.averagers import AVERAGERS
from qtdog.training.build import build_components
from qtdog.training.checkpoint import checkpoint_folders, read_checkpoint
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.shared_steps import (
    SharedRun,
    begin_fork_,
    fork_differences,
    fork_obstacle,
    fork_point_config,
    may_share_updates,
    open_shared_runs,
    prefix_of,
    reseeded,
)
from qtdog.training.step_rules import STEP_RULES

START = 3
DURING = [name for name in QUANTIZERS if not works_after_training(name)]


@pytest.fixture(scope="module")
def make(three_digits):
    """Return a function that makes the resolved configuration of seven steps, quantized from the third."""

    def config(**changes):
        base = {
            "data": {"target": "75", "batch_size": 4, "image_size": 8},
            "train": {"steps": 7, "eval_every": 2},
            "quantizer": {"name": "lsq", "start_step": START},
        }
        return resolve(build_config([load_preset("digits"), base, changes]), three_digits)

    return config


@pytest.fixture(scope="module")
def prefix(make, three_digits, tmp_path_factory):
    return train_fork_point(make(), three_digits, RunFolder(tmp_path_factory.mktemp("shared") / "prefix"))


def lines(folder: RunFolder) -> list[dict]:
    found = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "trained_s"} for line in found]


def assert_fork_is_the_run(config, three_digits, folder, checkpoint):
    whole, fork = RunFolder(folder / "whole"), RunFolder(folder / "fork")
    expected = run(config, three_digits, whole)
    result = run(config, three_digits, fork, fork_from=checkpoint)
    assert result["model_sha256"] == expected["model_sha256"]
    assert result["selected_step"] == expected["selected_step"]
    assert lines(fork) == lines(whole)
    return result, expected


@pytest.mark.parametrize("name", DURING)
def test_fork_of_each_quantizer_is_bit_identical(name, make, prefix, three_digits, tmp_path):
    assert_fork_is_the_run(make(quantizer={"name": name}), three_digits, tmp_path, prefix)


@pytest.mark.parametrize("name", list(AVERAGERS))
def test_fork_with_each_averager_is_bit_identical(name, make, prefix, three_digits, tmp_path):
    assert_fork_is_the_run(make(averager={"name": name}), three_digits, tmp_path, prefix)


@pytest.mark.parametrize("name", [name for name in STEP_RULES if name != "plain"])
def test_fork_with_each_step_rule_is_bit_identical(name, make, three_digits, tmp_path):
    config = make(step_rule={"name": name})
    checkpoint = train_fork_point(config, three_digits, RunFolder(tmp_path / "prefix"))
    assert_fork_is_the_run(config, three_digits, tmp_path, checkpoint)


@pytest.mark.parametrize(("start", "eval_every"), [(2, 2), (3, 4)])
def test_evaluation_due_at_the_fork_is_made_once_and_not_selectable(start, eval_every, make, three_digits, tmp_path):
    config = make(quantizer={"start_step": start}, train={"eval_every": eval_every, "steps": 5})
    checkpoint = train_fork_point(config, three_digits, RunFolder(tmp_path / "prefix"))
    assert_fork_is_the_run(config, three_digits, tmp_path, checkpoint)
    found = lines(RunFolder(tmp_path / "fork"))
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    assert [line["selectable"] for line in found] == [line["step"] > start for line in found]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"schedule": "cosine"}},
        {"optimizer": {"schedule": "linear", "decay_from": 1}},
        {"optimizer": {"name": "sgd", "momentum": 0.9, "lr": 0.01}, "quantizer": {"step_mode": "raw"}},
        {"quantizer": {"layer_bits": {"featurizer.0": 4}, "bits": 3}},
    ],
)
def test_fork_of_other_settings_is_bit_identical(changes, make, three_digits, tmp_path):
    config = make(**changes)
    checkpoint = train_fork_point(config, three_digits, RunFolder(tmp_path / "prefix"))
    assert_fork_is_the_run(config, three_digits, tmp_path, checkpoint)


def test_float_fork_keeps_what_was_selected_before(make, three_digits, tmp_path):
    config = make(quantizer={"name": "none", "start_step": None})
    checkpoint = train_fork_point(config, three_digits, RunFolder(tmp_path / "prefix"), until=4)
    result, _ = assert_fork_is_the_run(config, three_digits, tmp_path, checkpoint)
    assert result["forked_from_step"] == 4


def test_quantization_after_training_ships_what_was_chosen_before_the_fork(make, three_digits, tmp_path):
    config = make(quantizer={"name": "rtn", "start_step": None}, optimizer={"lr": 0.5})  # gets worse with each step
    checkpoint = train_fork_point(config, three_digits, RunFolder(tmp_path / "prefix"), until=6)
    result, _ = assert_fork_is_the_run(config, three_digits, tmp_path, checkpoint)
    assert result["selected_step"] < 6


@pytest.mark.parametrize("name", list(AVERAGERS))
def test_quantization_after_training_goes_on_with_the_average_of_the_same_float_run(name, make, three_digits, tmp_path):
    averager = {"name": name, "params": {"start": 2} if name in ("sma", "ema") else {}}
    train = {"steps": 7, "eval_every": 2, "checkpoint_every": 1}
    float_run = make(quantizer={"name": "none", "start_step": None}, averager=averager, train=train)
    run(float_run, three_digits, RunFolder(tmp_path / "float"))
    checkpoint = read_checkpoint(tmp_path / "float" / "checkpoint" / "step-00000006")
    config = make(quantizer={"name": "rtn", "start_step": None}, averager=averager, train=train)
    assert_fork_is_the_run(config, three_digits, tmp_path, checkpoint)
    if name != "none":
        other = make(quantizer={"name": "rtn", "start_step": None}, train=train)
        with pytest.raises(RunError, match=f"without an averager or with its own, not from one with '{name}'"):
            run(other, three_digits, RunFolder(tmp_path / "other"), fork_from=checkpoint)


@pytest.mark.parametrize("name", ["sma", "swa", "ema"])
def test_quantization_begins_with_the_average_of_the_float_steps(name, make, three_digits, tmp_path):
    """Forked, resumed at the start step and behind it, and trained in one go, it is the same run, bit for bit."""
    params = {"start": 2, "every": 1} if name == "swa" else {"start": 2}
    config = make(averager={"name": name, "params": params}, quantizer={"start_from": "average"})
    prefix = train_fork_point(config, three_digits, RunFolder(tmp_path / "prefix"))
    assert prefix_of(prefix).averager == config.averager
    _, expected = assert_fork_is_the_run(config, three_digits, tmp_path, prefix)
    assert f"quantization having begun with: {'exponential ' * (name == 'ema')}average of updates" in expected["kept"]
    whole = build_components(config, three_digits)
    state = begin_fork_(whole, prefix)
    average = whole.averager.hand_over()
    assert average is not None
    theirs = prefix.tensors["averager"]
    assert all(torch.equal(average[f"{site.prefix}original"], theirs[site.plain_name]) for site in sites(whole.network))
    assert state.selected is None
    for n_steps in (START, START + 1):
        broken = RunFolder(tmp_path / f"broken{n_steps}")
        with pytest.raises(Interrupted):
            run(config, three_digits, broken, callbacks=RunCallbacks(StopAfter(n_steps)))
        assert run(config, three_digits, broken, resume=True)["model_sha256"] == expected["model_sha256"]
        assert lines(broken) == lines(RunFolder(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("averager", "text"),
    [
        ({"name": "none"}, "averager 'none' has none that is ready"),
        ({"name": "bma"}, "averager 'bma' has none that is ready"),
        ({"name": "sma", "params": {"start": 100}}, "counts from update 100 on, and quantization begins at step"),
    ],
)
def test_an_average_that_is_not_there_is_no_beginning(averager, text, make, three_digits):
    with pytest.raises(ConfigError, match=text):
        build_components(make(averager=averager, quantizer={"start_from": "average"}), three_digits)


def test_time_of_the_prefix_is_not_counted_again(make, prefix, three_digits, tmp_path):
    late = replace(prefix, state=prefix.state | {"trained_s": 1e6})
    result, expected = assert_fork_is_the_run(make(), three_digits, tmp_path, late)
    assert result["trained_s"] < 1e3
    assert (expected["forked_from_step"], result["forked_from_step"]) == (0, START)


def test_one_prefix_serves_configurations_that_differ_after_it(make, three_digits, tmp_path):
    folder, told = RunFolder(tmp_path), []
    first = train_fork_point(make(), three_digits, folder)
    again = train_fork_point(
        make(quantizer={"bits": 3}), three_digits, folder, callbacks=RunCallbacks(warn=told.append)
    )
    assert again.state == first.state
    assert len(checkpoint_folders(folder.checkpoints)) == 2


def test_prefix_stopped_and_resumed_is_the_same(make, prefix, three_digits, tmp_path):
    with pytest.raises(Interrupted):
        train_fork_point(make(), three_digits, RunFolder(tmp_path / "broken"), callbacks=RunCallbacks(StopAfter(1)))
    checkpoint = train_fork_point(make(), three_digits, RunFolder(tmp_path / "broken"))
    assert_fork_is_the_run(make(), three_digits, tmp_path, checkpoint)


@pytest.mark.parametrize("stop_at", [1, 2])
def test_fork_stopped_and_resumed_is_the_same(stop_at, make, prefix, three_digits, tmp_path):
    whole, fork = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "fork")
    expected = run(make(), three_digits, whole)
    with pytest.raises(Interrupted):
        run(make(), three_digits, fork, fork_from=prefix, callbacks=RunCallbacks(StopAfter(stop_at)))
    assert read_checkpoint(checkpoint_folders(fork.checkpoints)[-1]).step == START + stop_at
    result = run(make(), three_digits, fork, resume=True)  # from its own checkpoint
    assert result["model_sha256"] == expected["model_sha256"]
    assert result["forked_from_step"] == START
    assert lines(fork) == lines(whole)


def test_members_may_share_a_beginning_if_that_is_asked_for(make, prefix, three_digits, tmp_path):
    config = make(train={"seed": 5})
    with pytest.raises(RunError, match=r"train\.seed: 0 → 5"):
        run(config, three_digits, RunFolder(tmp_path / "refused"), fork_from=prefix)
    result = run(config, three_digits, RunFolder(tmp_path / "member"), fork_from=reseeded(prefix, 5))
    alone = run(config, three_digits, RunFolder(tmp_path / "alone"))
    assert (result["forked_from_seed"], result["forked_from_step"]) == (0, START)
    assert result["model_sha256"] != alone["model_sha256"]
    assert lines(RunFolder(tmp_path / "member"))[0]["source"] == prefix.state["lines"][0]["source"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": {"lr": 0.5}}, r"optimizer\.lr: 0\.001 → 0\.5"),
        ({"data": {"target": "0"}}, r"data\.target: 75 → 0"),
        ({"train": {"eval_every": 3}}, r"train\.eval_every: 2 → 3"),
        ({"step_rule": {"name": "other"}}, r"step_rule\.name: plain → other"),
        ({"model": {"freeze_bn": False}}, r"model\.freeze_bn"),
    ],
)
def test_what_acts_before_the_fork_must_agree(changes, named, make):
    one, other = build_config([make().model_dump()]), build_config([make().model_dump(), changes])
    found = fork_differences(fork_point_config(one), other, START)
    assert len(found) == 1
    assert re.search(named, found[0])


def test_learning_rates_are_compared_by_value(make):
    one = make(optimizer={"schedule": "linear", "decay_from": 2})
    later = make(optimizer={"schedule": "cosine", "decay_from": 5}, train={"steps": 9})
    assert fork_differences(fork_point_config(one), later, 3) == []
    assert "learning rates of the first 4 steps" in fork_differences(fork_point_config(one), later, 4)[0]


def test_a_quantized_checkpoint_is_no_beginning(make, three_digits, tmp_path):
    run(make(), three_digits, RunFolder(tmp_path / "run"))
    checkpoint = read_checkpoint(checkpoint_folders(tmp_path / "run" / "checkpoint")[0])
    with pytest.raises(RunError, match="begins from a float run"):
        run(make(), three_digits, RunFolder(tmp_path / "fork"), fork_from=checkpoint)


def test_a_fork_behind_the_start_and_an_averager_that_began_before_are_refused(make, prefix, three_digits, tmp_path):
    with pytest.raises(RunError, match="at step 1 to 2, not from step 3"):
        run(make(quantizer={"start_step": 2}), three_digits, RunFolder(tmp_path / "a"), fork_from=prefix)
    config = make(quantizer={"name": "none", "start_step": None}, averager={"name": "swad"})
    with pytest.raises(RunError, match="counts weights from update 1 on"):
        run(config, three_digits, RunFolder(tmp_path / "b"), fork_from=prefix)


@pytest.mark.parametrize("layer", ["none", "context"])
@pytest.mark.parametrize("freeze_bn", [True, False])
def test_where_batch_norm_adapts_the_average_must_begin_behind_the_fork(layer, freeze_bn, make):
    config = make(model={"freeze_bn": freeze_bn, "feature_layer": layer}, quantizer={"name": "none"})
    config = build_config([config.model_dump(), {"averager": {"name": "sma"}}])
    sma = AVERAGERS["sma"]({"start": START}, 0)
    refused = [fork_obstacle(fork_point_config(config), config, sma, step) is not None for step in (START - 1, START)]
    assert refused == [False, layer == "context" or not freeze_bn]


@pytest.mark.parametrize("start", [START, START + 1])
@pytest.mark.parametrize("name", ["sma", "swa", "swad"])
@pytest.mark.parametrize("eval_every", [2, START])
def test_float_fork_with_an_averager_that_begins_at_the_fork(name, start, eval_every, make, three_digits, tmp_path):
    quantizer = {"name": "none", "start_step": None}
    params = {"start": start} | ({"n_converge": 1} if name == "swad" else {})
    config = make(quantizer=quantizer, averager={"name": name, "params": params}, train={"eval_every": eval_every})
    checkpoint = train_fork_point(config, three_digits, RunFolder(tmp_path / "prefix"), until=START)
    assert_fork_is_the_run(config, three_digits, tmp_path, checkpoint)


def test_no_float_step_to_share(make, three_digits, tmp_path):
    with pytest.raises(ConfigError, match="has no start step"):
        train_fork_point(make(quantizer={"name": "none", "start_step": None}), three_digits, RunFolder(tmp_path))
    for until in (0, START + 1):
        with pytest.raises(ConfigError, match="takes 1 to 3"):
            train_fork_point(make(), three_digits, RunFolder(tmp_path), until=until)


SHARED_START, STEPS = 3, 8
AVERAGED = [name for name in AVERAGERS if name != "none"]


@pytest.fixture(scope="module")
def make_pair(three_digits):
    """Return a function that makes the resolved configuration of eight steps with an averager."""

    def config(averager="none", quantizer="lsq", **changes):
        base = {
            "data": {"target": "75", "batch_size": 4, "image_size": 8},
            "train": {"steps": STEPS, "eval_every": 2, "checkpoint_every": 1},
            "quantizer": {"name": quantizer, "start_step": SHARED_START if quantizer == "lsq" else None},
            "averager": {"name": averager, "params": {"start": SHARED_START + 1} if averager == "sma" else {}},
        }
        return resolve(build_config([load_preset("digits"), base, changes]), three_digits)

    return config


def measured(folder: RunFolder) -> tuple[str, list[dict]]:
    result = folder.read_result()
    assert result is not None
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    return result["model_sha256"], [line | {"trained_s": 0} for line in lines]


@pytest.fixture(scope="module")
def alone(make_pair, three_digits, tmp_path_factory):
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
def test_runs_with_every_averager_are_bit_identical(quantizer, lead, make_pair, three_digits, alone, tmp_path):
    names = ["none", *AVERAGED]
    shared = SharedTraining(
        tmp_path, make_pair(lead, quantizer), *(make_pair(name, quantizer) for name in names if name != lead)
    )
    shared.train(three_digits)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_batch_norm_measured_for_an_average_does_not_reach_the_others(
    freeze_bn, make_pair, three_digits, alone, tmp_path
):
    changes = {"model": {"backbone": "test_resnet", "weights": "none", "freeze_bn": freeze_bn}}
    shared = SharedTraining(tmp_path, make_pair("none", "none", **changes), make_pair("sma", "none", **changes))
    shared.train(three_digits)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)


def test_runs_follow_a_run_that_begins_from_a_fork_point(make_pair, three_digits, alone, tmp_path):
    prefix = train_fork_point(make_pair(), three_digits, RunFolder(tmp_path / "prefix"))
    shared = SharedTraining(tmp_path, make_pair(), make_pair("sma"), make_pair("swad"))
    shared.train(three_digits, fork_from=prefix)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)
    results = [one.folder.read_result() or {} for one in shared.followers]
    assert [result["forked_from_step"] for result in results] == [SHARED_START, SHARED_START]


@pytest.mark.parametrize("kind", [StopAfter, StopWith])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_stopped_together_and_resumed_together(n, kind, make_pair, three_digits, alone, tmp_path):
    shared = SharedTraining(tmp_path, make_pair(), make_pair("sma"), make_pair("swad"))
    with pytest.raises(KeyboardInterrupt if kind is StopWith else Interrupted):
        shared.train(three_digits, callbacks=RunCallbacks(kind(n)))
    shared.train(three_digits)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)


def test_killed_between_two_saves_all_go_on_from_the_step_that_all_have(make_pair, three_digits, alone, tmp_path):
    shared = SharedTraining(tmp_path, make_pair(), make_pair("sma"))
    with pytest.raises(KeyboardInterrupt):
        shared.train(three_digits, callbacks=RunCallbacks(DieBeforeSaving()))
    assert [checkpoint_folders(RunFolder(tmp_path / name).checkpoints)[-1].name for name in ("lead", "sma")] == [
        "step-00000004",
        "step-00000005",
    ]
    shared.train(three_digits)
    assert shared.write_result(three_digits) == 0
    shared.check(alone)


def test_a_run_at_another_step_is_skipped(make_pair, three_digits, alone, tmp_path):
    shared = SharedTraining(tmp_path, make_pair(), make_pair("sma"), make_pair("swad"))
    with pytest.raises(Interrupted):
        shared.train(three_digits, callbacks=RunCallbacks(StopAfter(4)))
    shutil.rmtree(tmp_path / "sma")
    shared.train(three_digits)
    assert shared.write_result(three_digits) == STEPS
    shared.check(alone)


def test_a_run_with_other_weights_is_skipped(make_pair, three_digits, tmp_path):
    shared = SharedTraining(tmp_path, make_pair(), make_pair("sma"))
    other = make_pair(train={"seed": 1, "steps": STEPS, "eval_every": 2, "checkpoint_every": 1})
    with pytest.raises(Interrupted):
        shared.train(three_digits, callbacks=RunCallbacks(StopAfter(4)))
    with pytest.raises(Interrupted):
        run(other, three_digits, RunFolder(tmp_path / "other"), callbacks=RunCallbacks(StopAfter(4)))
    shutil.rmtree(shared.folder.checkpoints)
    shutil.copytree(tmp_path / "other" / "checkpoint", shared.folder.checkpoints)
    shared.train(three_digits)
    assert shared.write_result(three_digits) == STEPS - 4


def test_a_locked_or_foreign_folder_is_named_and_skipped(make_pair, three_digits, alone, tmp_path):
    shared, told = SharedTraining(tmp_path, make_pair(), make_pair("sma"), make_pair("swad")), []
    (tmp_path / "swad").mkdir()
    (tmp_path / "swad" / "notes.txt").write_text("mine")
    with shared.followers[0].folder.lock():
        shared.train(three_digits, callbacks=RunCallbacks(warn=told.append))
    assert measured(shared.folder) == alone(make_pair())
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


def test_a_run_that_collapses_does_not_stop_the_others(make_pair, three_digits, alone, tmp_path):
    shared = SharedTraining(tmp_path, make_pair(), make_pair("sma"), make_pair("swad"))
    collapsing = RunCallbacks(make_health_check=sma_collapses)
    shared.train(three_digits, callbacks=collapsing)
    assert measured(shared.folder) == alone(make_pair())
    with pytest.raises(CollapseError):
        shared.write_result(three_digits, callbacks=collapsing)
    assert shared.write_result(three_digits) == 2  # it went back to its last checkpoint, and kept that of the collapse
    shared.check(alone)


def test_of_several_processes_only_the_first_one_locks_and_claims(make_pair, three_digits, tmp_path):
    config, folder = make_pair("sma"), RunFolder(tmp_path / "sma")
    components = build_components(make_pair(), three_digits)
    second = replace(components, accelerator=SimpleNamespace(is_main_process=False, num_processes=1))
    with folder.lock(), open_shared_runs([SharedRun(config, folder)], second, 0, pytest.fail):
        pass  # the lock of the first process does not trouble the second, which writes nothing
    assert [path.name for path in folder.path.iterdir()] == [".lock"]


def test_only_the_averager_may_differ(make_pair):
    assert may_share_updates(make_pair(), make_pair("sma"))
    assert not may_share_updates(make_pair(), make_pair("sma", train={"seed": 1, "steps": STEPS}))
    assert not may_share_updates(make_pair(), make_pair("sma", "none"))


def test_a_run_that_differs_in_more_is_skipped(make_pair, three_digits, alone, tmp_path):
    shared, told = SharedTraining(tmp_path, make_pair(), make_pair("sma", "none")), []
    shared.train(three_digits, callbacks=RunCallbacks(warn=told.append))
    assert "sma trains by itself: it differs in more than the averager" in told[0]
    assert measured(shared.folder) == alone(make_pair())
