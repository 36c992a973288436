"""Feature layers and objectives with networks of their own, from training to the loaded file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtdog.core.config import Config
from qtdog.core.errors import FormatError, Interrupted
from qtdog.core.progress import StopAfter
from qtdog.data.known_datasets import RotatedDigits
from qtdog.models.backbones import create_network
from qtdog.packing.packed_file import load_packed
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import Checkpoint, latest_checkpoint
from qtdog.training.load_model import load_model, read_info
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run

CONTEXT = {"feature_layer": "context", "feature_params": {"width": 8}}
CASES: dict[str, dict[str, Any]] = {
    "mixstyle": {"model": {"feature_layer": "mixstyle"}},
    "mixstyle with miro": {"model": {"feature_layer": "mixstyle"}, "objective": {"name": "miro"}},
    "sagnet on maps": {"objective": {"name": "sagnet", "params": {"level": "map"}}},
    "arm": {"model": CONTEXT, "objective": {"name": "arm"}},
}
TINY = {"train": {"steps": 4, "eval_every": 4}, "optimizer": {"lr": 1e-4}}


@pytest.fixture
def config(short_config: Callable[..., Config], digits: RotatedDigits) -> Callable[[str], Config]:
    return lambda name: resolve(short_config(**TINY, **CASES[name]), digits)


def newest(folder: RunFolder) -> Checkpoint:
    found = latest_checkpoint(folder.checkpoints, print)
    assert found is not None
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_interrupted_between_quantized_steps_it_ends_the_same(tmp_path, config, digits, name):
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    run(config(name), digits, whole)
    with pytest.raises(Interrupted):
        run(config(name), digits, broken, callbacks=RunCallbacks(StopAfter(3)))
    run(config(name), digits, broken, resume=True)
    hashes = [hashlib.sha256(folder.model_file.read_bytes()).hexdigest() for folder in (whole, broken)]
    assert hashes[0] == hashes[1]
    one, other = newest(whole), newest(broken)
    assert one.step == other.step == 4
    for part, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[part].keys()
        assert all(torch.equal(value, other.tensors[part][key]) for key, value in tensors.items()), part


@pytest.mark.parametrize("name", ["mixstyle", "sagnet on maps"])
def test_what_only_trains_leaves_nothing_in_the_file(tmp_path, config, digits, name):
    folder = RunFolder(tmp_path)
    run(config(name), digits, folder)
    packed = load_packed(folder.model_file)
    plain = create_network(
        "digits_cnn", n_classes=10, channels=1, image_size=12, weights="none", freeze_bn=True, seed=0
    )
    assert packed.quantized.keys() | packed.rest.keys() == plain.state_dict().keys()
    shipped = load_model(folder.model_file)
    assert (shipped.info.feature_layer, shipped.info.feature_params) == ("none", {})
    assert not any(module._forward_hooks for module in shipped.modules())


def test_the_context_ships_quantized_and_answers_for_a_batch(tmp_path, config, digits):
    folder = RunFolder(tmp_path)
    result = run(config("arm"), digits, folder)  # which proves that the file gives the training-time logits
    names = [layer["name"] for layer in result["layers"]]
    assert [name for name in names if name.startswith("context")] == [f"context.layers.{i}" for i in (0, 3, 6)]
    shipped = load_model(folder.model_file)
    assert shipped.info.feature_layer == "context"
    assert shipped.info.feature_params == {"channels": 1, "width": 8, "group": 0}
    images = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(shipped(images), shipped(images))
        assert not torch.allclose(shipped(images)[:3], shipped(images[:3]))


def described(tmp_path, config, digits) -> dict[str, Any]:
    folder = RunFolder(tmp_path)
    run(config("mixstyle"), digits, folder)
    return load_packed(folder.model_file).metadata


def test_what_a_file_says_of_its_feature_layer_is_checked(tmp_path, config, digits):
    metadata = described(tmp_path, config, digits)
    older = {key: value for key, value in metadata.items() if not key.startswith("feature")}
    assert read_info(tmp_path, older).feature_layer == "none"
    for wrong in (
        {"feature_layer": "telepathy"},
        {"feature_layer": "context", "feature_params": {"width": 10**9}},
        {"feature_layer": "context", "feature_params": {"depth": 3}},
        {"feature_layer": "context", "feature_params": [8]},
        {"feature_layer": 5},
    ):
        with pytest.raises(FormatError):
            read_info(tmp_path, metadata | wrong)
