"""Finished runs on the embedded digits, trained once for all tests of ensembles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtdog.core.config_io import build_config, load_preset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.ensemble.model import Member, read_member
from qtdog.runs.folder import RunFolder
from qtdog.training.protocol import resolve
from qtdog.training.run import run

SHORT = {
    "data": {"target": "75", "batch_size": 8, "image_size": 12},
    "train": {"steps": 6, "eval_every": 2},
    "quantizer": {"name": "lsq", "bits": 7, "start_step": 2},
    "model": {"init_seed": 0},
}


@pytest.fixture(scope="session")
def train_member(digits: RotatedDigits, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Member]:
    """Return a function that trains a run of six small steps, with sections changed, and reads it as a member."""

    def make(**changes: dict[str, Any]) -> Member:
        config = resolve(build_config([load_preset("digits"), SHORT, changes]), digits)
        folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
        run(config, digits, folder)
        return read_member(folder.path)

    return make


@pytest.fixture(scope="session")
def quantized(train_member: Callable[..., Member]) -> list[Member]:
    """Three quantized members with one random start."""
    return [train_member(train={"seed": seed}) for seed in range(3)]


@pytest.fixture(scope="session")
def floats(train_member: Callable[..., Member]) -> list[Member]:
    """Two float members with one random start."""
    return [train_member(train={"seed": seed}, quantizer={"name": "none", "start_step": None}) for seed in range(2)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a test writes its model file."""
    return tmp_path / "made" / "model.safetensors"
