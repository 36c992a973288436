"""CLIP's text head, with a tiny CLIP of random weights that open_clip builds from a configuration made here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch.nn.functional import normalize

from qtdog.core.config import Config
from qtdog.core.errors import ModelError
from qtdog.data.open import open_dataset
from qtdog.models import backbones as clip_text
from qtdog.models.backbones import create_network
from qtdog.models.network import Network, pretrained_cfg
from qtdog.models.weights import read_weight_file
from qtdog.runs.folder import RunFolder
from qtdog.training.load_model import load_model
from qtdog.training.protocol import resolve
from qtdog.training.run import run

TOWER = "test_vit.r160_in1k"  # its head gives 1000 numbers, as many as the tiny text tower
SIZES = {
    "embed_dim": 1000,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
NAMES = ["polar_bear", "cat", "dog"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(7)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "tiny.pt")
    return "tiny-clip", folder / "tiny.pt"


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch, tiny: tuple[str, Path]) -> Any:
    monkeypatch.setitem(clip_text.TEXT_TOWERS, TOWER, (tiny[0], str(tiny[1])))
    return open_clip.create_model(tiny[0], pretrained=str(tiny[1])).eval()


@pytest.fixture
def image_weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "tower.pth"
    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), path)
    return path


def create(weights: str, **changes: Any) -> Network:
    options: dict[str, Any] = {"n_classes": 3, "channels": 3, "image_size": 32, "weights": weights, "freeze_bn": True}
    return create_network(TOWER, **options | {"seed": 0, "head": "text", "class_names": NAMES} | changes)


@torch.no_grad()
def test_the_network_begins_as_the_zero_shot_classifier(tower: Any, image_weights: Path):
    network = create(str(image_weights)).eval()
    images = torch.randn(4, 3, 32, 32)
    image_tower = timm.create_model("test_vit", img_size=32).eval()
    image_tower.load_state_dict(read_weight_file(image_weights))
    texts = open_clip.get_tokenizer("tiny-clip")([f"a photo of a {name}." for name in ("polar bear", "cat", "dog")])
    expected = tower.logit_scale.exp() * normalize(image_tower(images)) @ normalize(tower.encode_text(texts)).T
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
    assert network.features(images).norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert network.pretraining.endswith("; classifier from the class names")


def test_a_run_ships_and_loads_without_the_text_tower(
    tower: Any,
    image_weights: Path,
    image_tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short_config: Callable[..., Config],
):
    dataset = open_dataset(str(image_tree))
    config = short_config(
        data={"source": str(image_tree), "target": "night", "image_size": 32, "batch_size": 2},
        model={"backbone": TOWER, "weights": str(image_weights), "head": "text"},
        optimizer={"lr": 1e-5},
        train={"steps": 2, "eval_every": 1},
        quantizer={"start_step": 1},
    )
    result = run(resolve(config, dataset), dataset, RunFolder(tmp_path / "run"))
    assert result["pretraining"].startswith("file tower.pth")
    assert result["pretraining"].endswith("; classifier from the class names")
    monkeypatch.delitem(clip_text.TEXT_TOWERS, TOWER)
    monkeypatch.setitem(sys.modules, "open_clip", None)  # not needed to load a file
    with pytest.raises(ModelError, match="unknown backbone with a text tower"):
        create(str(image_weights))
    monkeypatch.setitem(clip_text.TEXT_TOWERS, TOWER, ("gone", "gone"))
    shipped = load_model(tmp_path / "run" / "model.safetensors")
    assert shipped.info.head == "text"
    assert shipped.network.features(torch.randn(2, 3, 32, 32)).norm(dim=1).tolist() == pytest.approx([1.0] * 2)


def test_what_cannot_be(tower: Any, image_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ModelError, match=r"--weights none has nothing that it fits"):
        create("none")
    with pytest.raises(ModelError, match=r"model\.head=text takes the classes' names through CLIP.*vit_base"):
        create_network(
            "resnet18", n_classes=3, channels=3, image_size=32, weights="none", freeze_bn=True, seed=0, head="text"
        )
    monkeypatch.setitem(clip_text.TEXT_TOWERS, TOWER, ("tiny-clip", str(tmp_path / "missing.pt")))
    with pytest.raises(ModelError, match=r"text tower of .* could not be had.*model\.head=linear"):
        create(str(image_weights))


def test_without_open_clip_the_message_names_the_extra(tower: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ModelError, match=r"pip install 'qtdog\[clip\]'"):
        clip_text.zero_shot_classifier(TOWER, NAMES)


def test_the_real_towers_fit_the_image_embeddings():
    for name, (model, weights) in list(clip_text.TEXT_TOWERS.items()):
        config = open_clip.get_model_config(model)
        assert config is not None
        assert config["embed_dim"] == pretrained_cfg(name).num_classes
        assert weights in open_clip.list_pretrained_tags_by_model(model)
