"""Losses of the whole batch are the same in two processes (gloo) as in one.

Run by torchrun, this file makes the runs: OUT OBJECTIVE… (see `make`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtdog.core.config_io import build_config, load_preset
from qtdog.data.digits import RotatedDigits
from qtdog.objectives.base import OBJECTIVES
from qtdog.training.build import build_components
from qtdog.training.loop import begin_step, update

NAMES = ["erm", "irm", "vrex", "groupdro", "coral", "deep-coral", "mmd", "fishr", "rsc", "mms"]
PARAMS = {"irm": {"anneal_steps": 0}, "vrex": {"anneal_steps": 0}, "fishr": {"anneal_steps": 0, "weight": 10.0}}
N_STEPS = 3


def make(name: str, out: Path) -> None:
    """Make three updates and save the network, the objective's state and the losses."""
    changes = {
        "data": {"target": "75", "image_size": 8, "batch_size": 4},
        "objective": {"name": name, "params": PARAMS.get(name, {})},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "quantizer": {"name": "none"},
    }
    config, digits = build_config([load_preset("digits"), changes]), RotatedDigits()
    parts = build_components(config, digits)
    parts.network.train()
    losses = []
    for step in range(N_STEPS):
        begin_step(parts, step)
        losses.append(update(parts, parts.batches.batch(step), step).item())
    state = {f"network.{key}": value.contiguous() for key, value in parts.network.state_dict().items()}
    state |= {f"objective.{key}": value for key, value in parts.objective.state_dict().items()}
    if parts.accelerator.is_main_process:
        save_file(state | {"losses": torch.tensor(losses)}, out / f"{name}.safetensors")


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, __file__, str(out), *NAMES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_objective_that_several_processes_share_is_compared():
    drawn = {"arm", "mixup"}  # a context of the process's own images, pairs drawn by each process
    assert set(NAMES) == {name for name in OBJECTIVES if not OBJECTIVES[name].ONE_PROCESS} - drawn


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_make_the_updates_of_one(name, in_two, tmp_path):
    make(name, tmp_path)
    one, two = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path, in_two))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=3e-5, msg=lambda text, key=key: f"{key}: {text}")


if __name__ == "__main__":
    for objective in sys.argv[2:]:
        make(objective, Path(sys.argv[1]))
