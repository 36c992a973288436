"""What all tests share: a cache of their own, a small tree of images, short runs on the embedded digits."""

from __future__ import annotations

import os

# The tests' networks are tiny: more than one thread each costs more in waiting than it saves, several times more where
# another process is busy. Set before torch is imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import gc
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from hypothesis import settings
from PIL import Image
from torch import Tensor

from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset
from qtdog.data.dataset import DomainSubset
from qtdog.data.known_datasets import RotatedDigits

# The tests write some 60,000 small files, and on some disks the removal of each takes milliseconds: they go to memory
# where there is plenty. Set before pytest makes its folder; `--basetemp` or PYTEST_DEBUG_TEMPROOT choose another place.
if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 6 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

# a first backward pass, or a busy machine, may take longer than hypothesis allows one example
settings.register_profile("qtdog", deadline=None)
settings.load_profile("qtdog")

SHORT = {
    "data": {"target": "75", "batch_size": 8, "image_size": 12},
    "train": {"steps": 6, "eval_every": 2},
    "quantizer": {"name": "lsq", "bits": 7, "start_step": 2},
}


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Decoded images go to a temporary folder, never to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTDOG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_power_cut() -> Any:
    """Leave out what makes a file safe from a power cut: a short run waits for the disk more than thirty times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_parser() -> Any:
    """Let all commands that run in this process share their parsers: typer makes them anew for each, 70 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True, scope="session")
def _libraries_are_no_garbage() -> None:
    """Keep what is imported by now out of garbage collection: it goes through a million objects every time."""
    gc.freeze()


@pytest.fixture(scope="session")
def digits() -> RotatedDigits:
    """The embedded digits, six domains."""
    return RotatedDigits()


@pytest.fixture(scope="session")
def three_digits(digits: RotatedDigits) -> DomainSubset:
    """Three domains of the digits: two sources and the target 75."""
    return DomainSubset(digits, ["0", "15", "75"])


@pytest.fixture(scope="session")
def one_registry() -> Any:
    """Let exports to ONNX share torch's table of operators: torch makes it anew for each, most of a second."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        make = functools.cache(_registration.ONNXRegistry.from_torchlib)
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(make))
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_plugins_of_other_modules() -> Any:
    """What a test module plugs in is gone after it: other tests run over all members of an axis."""
    yield
    plugins = sys.modules.get("qtdog.training.plugins")
    if plugins is not None:
        plugins.forget_plugins()


@pytest.fixture
def short_config() -> Callable[..., Config]:
    """Return a function that makes the configuration of a run of six small steps, with sections changed."""

    def make(**changes: dict[str, Any]) -> Config:
        return build_config([load_preset("digits"), SHORT, changes])

    return make


@pytest.fixture
def image_tree(tmp_path: Path) -> Path:
    """Make three domains of three classes of six images, 20 × 24 pixels, with a color per class."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for d, domain in enumerate(("indoor", "night", "outdoor")):
        for c, name in enumerate(("bird", "cat", "dog")):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 80, (20, 24, 3)) + 40 * d
                pixels[..., c] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def made() -> dict[str, Any]:
    """The functions of `tests/report/made_runs.py` by name: run folders with made-up numbers, in milliseconds."""
    return runpy.run_path(str(Path(__file__).parent / "report" / "made_runs.py"))


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    """The names of `tests/fake_device.py`: `fake_device()`, `hot()`, `FakeDeviceError`, `DEVICE`."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fake_device.py")))


@pytest.fixture(scope="session")
def make_run(made: dict[str, Any]) -> Callable[..., Path]:
    """Return a function that writes the folder of a finished run with made-up numbers."""
    return made["make_run"]


@pytest.fixture(scope="session")
def study(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 27 made-up runs and an ensemble, not to be changed."""
    return made["make_study"](tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def domainbed(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up results.jsonl of DomainBed, not to be changed."""
    return made["make_domainbed"](tmp_path_factory.mktemp("domainbed") / "results.jsonl")


def to_cpu(loss: Tensor) -> Tensor:
    return loss.cpu()


def read(loss: Tensor) -> Tensor:
    return loss * loss.item()


def branch(loss: Tensor) -> Tensor:
    return loss if loss > 0 else -loss


def mixed(loss: Tensor) -> Tensor:
    return loss + torch.ones(2).sum(dim=0, keepdim=True)


@pytest.fixture(params=[to_cpu, read, branch, mixed])
def device_fault(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """What a training step may not do with a loss on a device: copy it, read it, decide by it, mix it with the CPU."""
    return request.param
