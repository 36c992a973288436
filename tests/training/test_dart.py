"""DART: branches, merged now and then, stopped anywhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import ConfigError, Interrupted, RunError
from qtdog.core.progress import StopAfter
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import read_checkpoint
from qtdog.training.dart import dart as train_branches
from qtdog.training.dart import merged_state
from qtdog.training.load_model import load_model
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, no_health_check, run

STEPS, EVERY = 6, 2
TINY = {
    "data": {"target": "75", "batch_size": 4, "image_size": 8, "workers": 0},
    "model": {"init_seed": 0},
    "train": {"steps": STEPS, "eval_every": 3, "checkpoint_every": 1},
    "quantizer": {"name": "lsq", "start_step": 3},
}


# six steps from a random start may fall to chance and mean nothing by it
CALM = RunCallbacks(make_health_check=no_health_check)
dart = functools.partial(train_branches, callbacks=CALM)


@pytest.fixture
def branch(digits) -> Callable[..., Config]:
    def make(seed: int = 0, **changes: dict[str, Any]) -> Config:
        train = TINY["train"] | {"seed": seed} | changes.pop("train", {})
        return resolve(build_config([load_preset("digits"), TINY, {"train": train}, changes]), digits)

    return make


@pytest.fixture
def branches(branch) -> list[Config]:
    return [branch(0), branch(1), branch(2, objective={"name": "coral"})]


def test_one_branch_alone_is_a_plain_run(branch, digits, tmp_path):
    config = branch(train={"eval_every": EVERY})
    plain = run(config, digits, RunFolder(tmp_path / "plain"), callbacks=CALM)
    merged = dart([config], digits, tmp_path / "dart", merge_every=EVERY)
    for name in ("source_accuracy", "test_accuracy", "selected_step", "by_selection"):
        assert merged[name] == plain[name]
    one, other = (load_model(tmp_path / name / "model.safetensors").network.state_dict() for name in ("plain", "dart"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def network_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the network of a checkpoint, without what each branch counts for itself."""
    return read_checkpoint(folder / f"step-{step:08d}").tensors["network"]


def test_a_merge_is_the_mean_of_the_branches(branches, digits, tmp_path):
    result = dart(branches, digits, tmp_path, merge_every=EVERY)
    apart = [network_at(tmp_path / f"branch-{number}" / "checkpoint", STEPS) for number in range(3)]
    assert not torch.equal(apart[0]["classifier.weight"], apart[1]["classifier.weight"])  # they did part
    merged = network_at(tmp_path / "merged", STEPS)
    for name in ("classifier.weight", "classifier.bias"):
        mean = torch.stack([state[name].double() for state in apart]).mean(0)
        torch.testing.assert_close(merged[name].double(), mean, rtol=0, atol=1e-6)
    assert result["kept"] == f"mean of 3 branches after update {result['selected_step']}"
    assert result["dart"]["n_branches"] == 3
    assert result["selected_step"] in (4, 6)  # quantized


def test_every_branch_goes_on_from_the_merge(branch, digits, tmp_path):
    # the second branch cannot move on its own: what it has one step behind the merge is the merge
    two = [branch(0), branch(1, optimizer={"lr": 1e-30})]
    stop = replace(CALM, callback=StopAfter(2 * EVERY + EVERY + 1))
    with pytest.raises(Interrupted):
        dart(two, digits, tmp_path, merge_every=EVERY, callbacks=stop)
    merged = network_at(tmp_path / "merged", EVERY)
    before, after = (network_at(tmp_path / "branch-1" / "checkpoint", step) for step in (EVERY, EVERY + 1))
    assert not torch.equal(before["classifier.weight"], merged["classifier.weight"])
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(after[name], merged[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the undisturbed one goes, made once."""
    return tmp_path_factory.mktemp("whole")


@pytest.mark.parametrize("stop_at", [1, 6, 8, 16])
def test_stopped_anywhere_it_ends_with_the_same_file(branches, digits, whole, tmp_path, stop_at):
    dart(branches, digits, whole, merge_every=EVERY)
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        dart(branches, digits, broken, merge_every=EVERY, callbacks=replace(CALM, callback=StopAfter(stop_at)))
    dart(branches, digits, broken, merge_every=EVERY, resume=True)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    ends = [read_checkpoint(path / "merged" / "step-00000006") for path in (whole, broken)]
    assert ends[0].state == ends[1].state


def test_a_finished_one_is_not_made_again(branch, digits, tmp_path):
    first = dart([branch(0), branch(1)], digits, tmp_path, merge_every=3)
    assert json.loads((tmp_path / "result.json").read_text()) == first
    stamp = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert dart([branch(0), branch(1)], digits, tmp_path, merge_every=3, resume=True) == first
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(RunError, match="holds other branches"):
        dart([branch(0), branch(2)], digits, tmp_path, merge_every=3, resume=True)


def test_averages_of_the_branches_are_merged_in_the_end(branch, digits, tmp_path):
    swad = {"name": "swad", "params": {"n_converge": 1, "n_tolerance": 3}}
    result = dart([branch(0, averager=swad), branch(1, averager=swad)], digits, tmp_path, merge_every=EVERY)
    assert result["selected_step"] == STEPS


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"quantizer": {"name": "lsq", "start_step": 3, "bits": 4}}, r"branches 0 and 1 .* quantizer\.bits: 7 → 4"),
        ({"data": TINY["data"] | {"trial": 1}}, r"data\.trial: 0 → 1"),
        ({"model": {"init_seed": 3}}, r"random start \(0 → 3\)"),
    ],
)
def test_branches_that_cannot_be_merged_are_refused(branch, digits, tmp_path, other, message):
    with pytest.raises(ConfigError, match=message):
        dart([branch(0), branch(1, **other)], digits, tmp_path, merge_every=EVERY)


@pytest.mark.parametrize(
    ("changes", "every", "message"),
    [
        ({}, 0, "merge_every must be at least 1"),
        ({"averager": {"name": "sma"}}, 2, "'sma' would average across the merges"),
        ({"quantizer": {"name": "rtn", "start_step": None}}, 2, "'rtn' works after training"),
        ({"quantizer": {"name": "inq", "start_step": 1}}, 2, "'inq' freezes other codes in each branch"),
    ],
)
def test_what_makes_no_sense_for_branches_is_refused(branch, digits, tmp_path, changes, every, message):
    with pytest.raises(ConfigError, match=message):
        dart([branch(0, **changes), branch(1, **changes)], digits, tmp_path, merge_every=every)
    assert not list(tmp_path.iterdir())


def test_branches_that_add_noise_of_their_own_are_merged(branch, digits, tmp_path):
    noise = {"name": "noise-accumulated", "start_step": 1}
    result = dart([branch(0, quantizer=noise), branch(1, quantizer=noise)], digits, tmp_path, merge_every=EVERY)
    assert result["kept"].startswith("mean of 2 branches")


def test_codes_of_their_own_cannot_be_merged():
    states = [{"w": torch.zeros(2), "codes": torch.tensor([code], dtype=torch.int8)} for code in (1, 2)]
    with pytest.raises(ConfigError, match="'codes' differs between the branches"):
        merged_state(states)


def test_the_folder_of_each_branch_is_a_run(branch, digits, tmp_path: Path):
    dart([branch(0), branch(1)], digits, tmp_path, merge_every=3)
    for number in range(2):
        folder = RunFolder(tmp_path / f"branch-{number}")
        config = folder.read_config()
        assert config is not None
        assert config.train.seed == number
        assert [record.seen.step for record in folder.read_metrics()] == [3, 6]
