"""The known backbones: each is what the published table says, and the small ones go all the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from qtdog.conversion.attach import attach
from qtdog.conversion.inspect import estimate_size
from qtdog.conversion.load import load_into
from qtdog.conversion.save import bake, save
from qtdog.models.backbones import KNOWN_BACKBONES, create_network
from qtdog.models.network import Network, input_size
from qtdog.packing.sizes import file_sizes

TABLE = Path(__file__).parents[2] / "docs" / "results" / "backbones.json"
MEASURED = {row["backbone"]: row for row in json.loads(TABLE.read_text())["results"]}
N_CLASSES = 7  # as in the table
SMALL = {  # name → pixels that are enough here; the table has each at its own size
    "resnet18.tv_in1k": 32,
    "mobilenetv3_large_100.ra_in1k": 32,
    "tf_efficientnet_lite0": 32,
    "distilbert-mini": 0,
    "mnist_cnn": 28,
    "digits_cnn": 28,
}


def make(name: str, size: int) -> Network:
    channels = 1 if name.endswith("_cnn") else 3
    options: dict[str, Any] = {"weights": "none", "freeze_bn": True, "seed": 0}
    return create_network(name, n_classes=N_CLASSES, channels=channels, image_size=size, **options)


def test_every_known_backbone_is_in_the_table():
    assert set(MEASURED) == set(KNOWN_BACKBONES)


@pytest.mark.parametrize("name", KNOWN_BACKBONES)
def test_the_table_has_the_parameters_and_bytes_of_today(name: str):
    with torch.device("meta"):
        network = make(name, input_size(name) or 224)
    found, measured = estimate_size(network, bits=7), MEASURED[name]
    assert found.n_parameters == measured["n_parameters"]
    header = measured["float32_bytes"] - found.float32_bytes
    assert 0 < header < 60_000  # names and shapes
    assert measured["bytes"] < found.packed_bytes + header  # entropy coding only saves


@pytest.mark.parametrize(("name", "size"), SMALL.items())
def test_attach_train_a_step_pack_load_and_predict(name: str, size: int, tmp_path: Path):
    network = make(name, size)
    generator = torch.Generator().manual_seed(0)
    channels = 1 if name.endswith("_cnn") else 3
    batch = torch.randn(2, channels, size, size, generator=generator) if size else torch.randint(1, 99, (2, 9))
    quantizers = attach(network, bits=7, exclude=["classifier"])
    quantizers.enable()
    optimizer = torch.optim.SGD(quantizers.param_groups(1e-2), lr=1e-2)
    cross_entropy(network(batch), torch.tensor([0, 1])).backward()
    assert [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None] == []
    optimizer.step()
    save(network, tmp_path / "model.safetensors")
    loaded = load_into(tmp_path / "model.safetensors", make(name, size))
    assert torch.equal(loaded(batch), network.eval()(batch))
    assert file_sizes(tmp_path / "model.safetensors").ratio > 4


def test_the_estimate_counts_codes_step_sizes_and_the_rest():
    network = make("tf_efficientnet_lite0", 32)
    found = estimate_size(network, bits=5, exclude=["classifier", "featurizer.conv_stem"])
    attach(network, bits=5, exclude=["classifier", "featurizer.conv_stem"]).enable()
    baked = bake(network)
    codes = sum(-(-5 * value.codes.numel() // 8) + 4 * value.scale.numel() for value in baked.quantized.values())
    rest = sum(value.numel() * value.element_size() for value in baked.rest.values())
    assert found.packed_bytes == codes + rest


def test_a_tied_weight_counts_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(10, 10, bias=False), "b": torch.nn.Linear(10, 10, bias=False)})
    model["b"].weight = model["a"].weight
    assert estimate_size(model, bits=8, exclude=()).packed_bytes == 100 + 40
