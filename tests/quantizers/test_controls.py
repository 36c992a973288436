"""The noise controls: how the noise is distributed, where it is and where not, and what ships."""

import math

import pytest
import torch
from torch import nn

from qtdog.conversion.attach import attach, attached
from qtdog.conversion.load import load_into
from qtdog.conversion.save import bake, save
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import Quantizer, QuantizerOptions
from qtdog.quantizers.controls import AccumulatedNoise, FreshNoise, MatchedNoise, NoiseThenRound
from qtdog.quantizers.step_size_init import initial_scale

N = 40_000
A = 0.03
IN_TRAINING = [FreshNoise, MatchedNoise, NoiseThenRound]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def enabled(kind: type[Quantizer], weight: torch.Tensor, bits: int = 4, axis: int | None = 0) -> Quantizer:
    quantizer = kind(weight, QuantSpec(bits, axis), QuantizerOptions(amplitude=A))  # pyright: ignore[reportCallIssue]
    quantizer.enable_(weight)
    return quantizer


def assert_uniform(noise: torch.Tensor, width: torch.Tensor) -> None:
    """U(-width/2, width/2) in every row: bounds, mean and variance, and the share in each of ten bins."""
    unit = noise.double() / width.double().reshape(-1, 1)
    n = unit.shape[1]
    assert unit.abs().max() <= 0.5 + 1e-5  # adding and subtracting the weight rounds
    # standard errors: of the mean sqrt(1/12n), of the variance sqrt((1/80 - 1/144)/n)
    assert unit.mean(1).abs().max() < 5 * math.sqrt(1 / 12 / n)
    assert (unit.square().mean(1) - 1 / 12).abs().max() < 5 * math.sqrt((1 / 80 - 1 / 144) / n)
    counts = torch.stack([torch.histc(row.float(), 10, -0.5, 0.5) for row in unit])
    assert (counts - n / 10).abs().max() < 5 * math.sqrt(0.09 * n)


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("kind", IN_TRAINING)
def test_training_noise_is_uniform_with_the_width_of_a_step(kind: type[Quantizer], axis: int | None) -> None:
    weight = draw(3, N) * torch.tensor([[1.0], [0.1], [5.0]])
    quantizer = enabled(kind, weight, axis=axis)
    quantizer.begin_step_(weight, 11, 0.0)
    step = torch.tensor([2 * A]) if kind is FreshNoise else initial_scale(weight, QuantSpec(4, axis))
    assert_uniform(quantizer(weight) - weight, step.expand(3))


def test_accumulated_noise_is_a_random_walk_of_the_weight_itself() -> None:
    weight = torch.zeros(2, N)
    quantizer = enabled(AccumulatedNoise, weight)
    quantizer.begin_step_(weight, 0, 0.0)
    assert_uniform(weight, torch.full((2,), 2 * A))
    for step in range(1, 12):
        quantizer.begin_step_(weight, step, step / 12)
    assert weight.std().item() == pytest.approx(A * math.sqrt(12 / 3), rel=0.02)
    assert quantizer(weight) is weight


def test_a_step_that_begins_again_adds_its_accumulated_noise_once() -> None:
    weight = torch.zeros(2, 8)
    quantizer = enabled(AccumulatedNoise, weight)
    quantizer.begin_step_(weight, 5, 0.0)
    once, twin = weight.clone(), enabled(AccumulatedNoise, weight)
    twin.load_state_dict(quantizer.state_dict())  # stopped and resumed in the middle of the step
    twin.begin_step_(weight, 5, 0.0)
    assert torch.equal(weight, once)
    twin.begin_step_(weight, 6, 0.5)
    assert not torch.equal(weight, once)


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_the_same_noise_in_every_pass_of_a_step_and_another_in_the_next(kind: type[Quantizer]) -> None:
    weight = draw(3, 20)
    quantizer = enabled(kind, weight)
    passes = []
    for seed in (1, 1, 2):
        quantizer.begin_step_(weight, seed, 0.0)
        passes += [quantizer(weight), quantizer(weight)]
    assert all(torch.equal(passes[0], other) for other in passes[1:4])
    assert torch.equal(passes[4], passes[5])
    assert not torch.equal(passes[0], passes[4])


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_the_gradient_of_training_passes_unchanged(kind: type[Quantizer]) -> None:
    weight = draw(3, 20) * 10  # with some weights beyond the range
    quantizer = enabled(kind, weight, bits=2)
    weight.requires_grad_()
    grad = draw(3, 20, seed=1)
    quantizer(weight).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad)


@pytest.mark.parametrize("kind", [*IN_TRAINING, AccumulatedNoise])
def test_memory_format_and_type_are_kept(kind: type[Quantizer]) -> None:
    weight = draw(4, 3, 2, 2).to(torch.bfloat16).to(memory_format=torch.channels_last)
    quantizer = enabled(kind, weight)
    quantizer.begin_step_(weight, 1, 0.0)
    for _ in range(2):
        out = quantizer(weight)
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=torch.channels_last)
        quantizer.eval()


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_noise_does_not_depend_on_the_memory_format(kind: type[Quantizer]) -> None:
    weight = draw(4, 3, 2, 2)
    outs = []
    for one in (weight, weight.to(memory_format=torch.channels_last)):
        quantizer = enabled(kind, one)
        quantizer.begin_step_(one, 3, 0.0)
        outs.append(quantizer(one))
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_noise_then_round_evaluates_the_nearest_point_of_the_grid_of_the_start(bits: int) -> None:
    start = draw(3, 50)
    quantizer = enabled(NoiseThenRound, start, bits).eval()
    weight = draw(3, 50, seed=1) * 4  # moved since, some beyond the range
    scale = initial_scale(start, QuantSpec(bits)).reshape(3, 1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    levels = torch.arange(low, high + 1) * scale.unsqueeze(-1)
    nearest = levels.expand(3, 50, -1).gather(-1, (weight.unsqueeze(-1) - levels).abs().argmin(-1, keepdim=True))
    assert torch.equal(quantizer(weight), nearest.squeeze(-1))
    value = quantizer.quantized(weight)
    assert torch.equal(value.dequantize(), quantizer(weight))
    if bits == 2:
        assert (weight / scale < low - 1).any()
        assert (weight / scale > high + 1).any()
        assert value.codes.unique().tolist() == [-2, -1, 0, 1]


@pytest.mark.parametrize("init", ["lsq", "lsq_plus", "minmax", "mse"])
@pytest.mark.parametrize("kind", [MatchedNoise, NoiseThenRound])
def test_the_start_decides_how_strong_the_noise_is(kind: type[MatchedNoise | NoiseThenRound], init: str) -> None:
    weight = draw(4, 100)
    quantizer = kind(weight, QuantSpec(5), QuantizerOptions(init=init))
    quantizer.enable_(weight)
    assert torch.equal(quantizer.step_sizes(), initial_scale(weight, QuantSpec(5), init))


@pytest.mark.parametrize("kind", [MatchedNoise, NoiseThenRound])
def test_three_steps_of_seven_bits_are_the_noise_of_four(kind: type[MatchedNoise | NoiseThenRound]) -> None:
    weight = draw(3, N)
    quantizer = kind(weight, QuantSpec(7), QuantizerOptions(noise_width=3))
    quantizer.enable_(weight)
    quantizer.begin_step_(weight, 11, 0.0)
    four_bits = initial_scale(weight, QuantSpec(4), "lsq")  # 2 mean|w| / sqrt(7), for 7 bits / sqrt(63)
    assert_uniform(quantizer(weight) - weight, four_bits)
    rounded = quantizer.eval()(weight)
    if kind is NoiseThenRound:  # on the fine grid
        assert (rounded - weight).abs().max() <= 0.51 * initial_scale(weight, QuantSpec(7), "lsq").max()


def test_noise_then_round_leaves_out_the_lowest_code_of_a_symmetric_range() -> None:
    weight = torch.tensor([[-9.0, 1.0, 0.5, -0.5]])
    quantizer = NoiseThenRound(weight, QuantSpec(2), QuantizerOptions(range="symmetric"))
    quantizer.enable_(torch.tensor([[0.5, 0.5, 0.5, -0.5]]))  # a step of 1
    assert quantizer.eval()(weight).tolist() == [[-1.0, 1.0, 0.0, 0.0]]
    assert quantizer.quantized(weight).codes.tolist() == [[-1, 1, 0, 0]]


NAMES = ["noise-accumulated", "noise-fresh", "noise-matched", "noise-then-round"]


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        attached(model).begin_step(step, step / 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(draw(6, 1, 4, 4, seed=step)), torch.arange(6) % 3).backward()
        optimizer.step()


def trained(name: str, steps: range) -> nn.Sequential:
    model = make()
    attach(model, quantizer=name, bits=4).enable()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), steps)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_short_training_stopped_and_restored_ends_the_same(name: str) -> None:
    whole, first = trained(name, range(8)), trained(name, range(3))
    twin = make(1)
    attach(twin, quantizer=name, bits=4)
    twin.load_state_dict(first.state_dict())
    attached(twin).set_enabled(True)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.05), range(3, 8))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_still_and_the_file_gives_the_same(tmp_path, name: str) -> None:
    model = trained(name, range(4)).eval()
    images = draw(6, 1, 4, 4, seed=9)
    logits = model(images)
    assert torch.equal(model(images), logits)
    save(model, tmp_path / "model.safetensors")
    assert torch.equal(load_into(tmp_path / "model.safetensors", make(1))(images), logits)
    assert len(bake(model).quantized) == (2 if name == "noise-then-round" else 0)
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_baked_in_training_mode_ships_without_noise(name: str) -> None:
    model = trained(name, range(4))
    baked = bake(model)
    assert model.training
    model.eval()
    value = baked.quantized["0.weight"].dequantize() if "0.weight" in baked.quantized else baked.rest["0.weight"]
    convolution = model[0]
    assert isinstance(convolution, nn.Conv2d)
    assert torch.equal(value, convolution.weight)
