"""The controls that freeze: nothing moves the layers, everything else trains, and the file says what was frozen."""

import copy

import pytest
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.load import load_into
from qtdog.conversion.save import bake, save
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import encode
from qtdog.quantizers.controls import Released
from qtdog.quantizers.step_size_init import initial_scale


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 3)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> None:
    for step in range(n_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(draw(6, 1, 4, 4, seed=step)), torch.arange(6) % 3).backward()
        optimizer.step()


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("name", ["freeze", "released"])
def test_the_optimizer_leaves_frozen_weights_exactly_alone_and_moves_the_rest(name: str, kind: str) -> None:
    model = make()
    quantizers = attach(model, quantizer=name, bits=4, exclude=["5"])
    optimizer = optimizer_of(kind, model)
    train(model, optimizer, 4)  # momentum is there when the freezing begins
    quantizers.enable()
    before = copy.deepcopy(model.state_dict())
    moments = {key: copy.deepcopy(optimizer.state[value]) for key, value in model.named_parameters()}
    train(model, optimizer, 5)
    frozen = [key for key in before if key.endswith("original")]
    assert len(frozen) == 2
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key]) == (key in frozen), key
    for key in frozen:
        for what, value in optimizer.state[dict(model.named_parameters())[key]].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[key][what])), (key, what)


def test_released_computes_with_the_grid_of_the_start_once_and_for_all() -> None:
    weight = draw(5, 3, 3, 3)
    spec = QuantSpec(3)
    released = Released(weight, spec)
    released.enable_(weight)
    expected = encode(weight, initial_scale(weight, spec), spec)
    for _ in range(2):
        assert torch.equal(released(weight), expected.dequantize())
        assert torch.equal(released.quantized(weight).codes, expected.codes)
        released.eval()
    assert list(released.parameters()) == []


@pytest.mark.parametrize(("name", "n_packed"), [("freeze", 0), ("released", 2)])
def test_the_file_gives_the_trained_model_bit_for_bit(tmp_path, name: str, n_packed: int) -> None:
    model = make()
    quantizers = attach(model, quantizer=name, bits=4, exclude=["5"])
    before = model[0].get_parameter("parametrizations.weight.original").detach().clone()
    quantizers.enable()
    train(model, optimizer_of("adam", model), 3)
    model.eval()
    save(model, tmp_path / "model.safetensors")
    plain = load_into(tmp_path / "model.safetensors", make(1))
    images = draw(6, 1, 4, 4, seed=9)
    assert torch.equal(plain(images), model(images))
    assert len(bake(model).quantized) == n_packed
    assert torch.equal(plain.state_dict()["0.weight"], before) == (name == "freeze")
