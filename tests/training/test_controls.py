"""Every shipped control trains to the end, ships what it says it ships, and can be stopped anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset, preset_names
from qtdog.core.errors import Interrupted
from qtdog.core.progress import StopAfter
from qtdog.data.known_datasets import RotatedDigits
from qtdog.packing.packed_file import load_packed
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import latest_checkpoint, read_checkpoint
from qtdog.training.load_model import load_model
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run

SETTINGS = ("digits", "domainbed", "mnist", "pacs-lite")
NAMES = [name for name in preset_names() if not name.startswith("paper/")]  # those have tests of their own
CONTROLS = [name for name in NAMES if set(load_preset(name)) <= {"quantizer", "optimizer"}]
RECIPES = [name for name in NAMES if {"averager", "step_rule"} & set(load_preset(name))]
FLOAT = {"float", "float-decay", "freeze", "noise-accumulated", "noise-fresh", "noise-matched"}
TINY = {"data": {"target": "75", "batch_size": 4, "image_size": 8}, "train": {"steps": 6, "eval_every": 2}}
START, STOP_AT = 2, 4  # in the middle of the quantized steps
N_LAYERS = 4  # that digits_cnn has besides its classifier


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """The undisturbed runs so far, by control."""
    return {}


@pytest.fixture
def tiny(short_config: Callable[..., Config], digits: RotatedDigits) -> Callable[[str], Config]:
    """Return a function that makes a control's configuration of a tiny run."""

    def make(name: str) -> Config:
        tree = load_preset(name)
        quantizer = tree["quantizer"] | {"start_step": START}
        if quantizer["name"] in ("obc", "gptq"):
            quantizer |= {"calibration_images": 16}
        # Six steps at the preset's rate may begin well and fall to chance by accident, which the health watch stops.
        optimizer = {"lr": 1e-4} | tree.get("optimizer", {})
        return resolve(short_config(**TINY, quantizer=quantizer, optimizer=optimizer), digits)

    return make


@pytest.fixture
def whole(
    tiny: Callable[[str], Config],
    digits: RotatedDigits,
    finished: dict[str, RunFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], RunFolder]:
    """Return a function that gives the folder of a control's undisturbed run, made once."""

    def make(name: str) -> RunFolder:
        if name not in finished:
            folder = RunFolder(tmp_path_factory.mktemp(name) / "run")
            run(tiny(name), digits, folder)  # which proves that the file gives the training-time logits
            finished[name] = folder
        return finished[name]

    return make


def network_at(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder.checkpoints / f"step-{step:08d}").tensors["network"]


def test_every_quantizer_has_a_preset_and_every_preset_has_its_kind() -> None:
    assert set(NAMES) == {*SETTINGS, *CONTROLS, *RECIPES}
    assert {"none", *QUANTIZERS} == {load_preset(name)["quantizer"]["name"] for name in CONTROLS}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_control_goes_on_top_of_every_setting(setting: str) -> None:
    plain = build_config([load_preset(setting)])
    for name in CONTROLS:
        tree = load_preset(name)
        config = build_config([load_preset(setting), tree])
        for section, values in tree.items():
            assert {key: getattr(getattr(config, section), key) for key in values} == values
        assert (config.data, config.model, config.train) == (plain.data, plain.model, plain.train)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_ships_what_it_says(whole: Callable[[str], RunFolder], tiny: Callable[[str], Config], name: str):
    config, folder = tiny(name), whole(name)
    packed = load_packed(folder.model_file)
    assert len(packed.quantized) == (0 if name in FLOAT else N_LAYERS)
    assert {value.spec.bits for value in packed.quantized.values()} <= {config.quantizer.bits}
    model = load_model(folder.model_file)
    assert model.info.bits == (None if name in FLOAT else config.quantizer.bits)
    assert torch.isfinite(model(torch.zeros(2, 1, 8, 8))).all()


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_that_was_stopped_ends_the_same(
    tmp_path: Path,
    whole: Callable[[str], RunFolder],
    tiny: Callable[[str], Config],
    digits: RotatedDigits,
    name: str,
) -> None:
    config, one, other = tiny(name), whole(name), RunFolder(tmp_path)
    with pytest.raises(Interrupted):
        run(config, digits, other, callbacks=RunCallbacks(callback=StopAfter(STOP_AT)))
    stopped = latest_checkpoint(other.checkpoints, print)
    assert stopped is not None
    assert stopped.step == STOP_AT
    run(config, digits, other, resume=True)

    hashes = [hashlib.sha256(folder.model_file.read_bytes()).hexdigest() for folder in (one, other)]
    assert hashes[0] == hashes[1]
    assert one.read_metrics() == other.read_metrics()
    ends = [read_checkpoint(folder.checkpoints / f"step-{config.train.steps:08d}") for folder in (one, other)]
    for part, tensors in ends[0].tensors.items():
        assert tensors.keys() == ends[1].tensors[part].keys()
        assert all(torch.equal(value, ends[1].tensors[part][key]) for key, value in tensors.items()), part


@pytest.mark.parametrize("name", ["float", "lsq", "noise-fresh", "inq"])
def test_selection_waits_until_the_member_has_done_its_work(whole: Callable[[str], RunFolder], name: str) -> None:
    """INQ's last stage begins with the last of the four quantized steps."""
    selectable = {record.seen.step: record.seen.selectable for record in whole(name).read_metrics()}
    assert selectable == {2: name == "float", 4: name != "inq", 6: True}


def test_all_controls_are_one_run_until_the_start_step(whole: Callable[[str], RunFolder]) -> None:
    names = ("float", "float-decay", "lsq-decay", "inq", "noise-accumulated")
    firsts = [whole(name).read_metrics()[0] for name in names]
    assert {first.seen.step for first in firsts} == {START}
    measured = [(first.seen.source, first.test, first.train_loss) for first in firsts]
    assert measured == [measured[0]] * len(names)


@pytest.mark.parametrize("name", ["freeze", "released", "lsq"])
def test_a_freezing_control_trains_only_what_it_does_not_freeze(whole: Callable[[str], RunFolder], name: str) -> None:
    before, after = (network_at(whole(name), step) for step in (4, 6))
    still = {key for key, value in before.items() if torch.equal(value, after[key])}
    layers = {key for key in before if key.endswith("original")}
    assert len(layers) == N_LAYERS
    assert (layers & still) == (set() if name == "lsq" else layers)
    assert not {key for key in still if not key.startswith(tuple(key[: -len("original")] for key in layers))}
