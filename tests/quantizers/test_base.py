"""What holds for every quantizer with a grid, whatever it reads: a new one is covered by its name in the registry."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import CHOICES, Quantizer, QuantizerOptions
from qtdog.quantizers.registry import QUANTIZERS, works_after_training

LATE = 0.99  # of the quantized steps: by then INQ has frozen its last weight
SHAPES = [(4, 5, 3), (6, 1), (1, 7), (1, 1), (3, 2, 3, 3)]
# The last of each type are denormal.
SIZES = {
    torch.float32: [1.0, 0.02, 1e30, 1e-30, 1e-37, 1e-42],
    torch.bfloat16: [1.0, 1e30, 1e-30, 1e-40],
    torch.float16: [1.0, 2e4, 1e-4, 1e-6],
}
NORMAL = {torch.float32: [1.0, 0.02, 1e30, 1e-30], torch.bfloat16: [1.0], torch.float16: [1.0]}
CASE = dict[str, Any]
few = settings(max_examples=12, deadline=None)  # for each member


def members() -> Iterator[tuple[str, CASE]]:
    """Every quantizer as it is by default, and with each other choice that it reads."""
    for name in QUANTIZERS:
        if works_after_training(name):
            continue
        yield name, {}
        for option in sorted(QUANTIZERS[name].reads & CHOICES.keys()):
            yield from ((name, {option: choice}) for choice in CHOICES[option][1:])


def ready(member: tuple[str, CASE], weight: Tensor, spec: QuantSpec) -> Quantizer:
    """The quantizer, enabled on `weight` and near the end of training."""
    name, options = member
    quantizer = QUANTIZERS[name].make(weight, spec, QuantizerOptions(**options))
    quantizer.enable_(weight)
    quantizer.begin_step_(weight, 3, LATE)
    return quantizer


MEMBERS = [member for member in members() if ready(member, torch.randn(2, 3), QuantSpec(4)).packs]
IDS = ["-".join([name, *options.values()]) for name, options in MEMBERS]


def draw_weight(shape: tuple[int, ...], seed: int, dtype: torch.dtype, size: float) -> Tensor:
    """Normal weights up to `size`; where there is room the first channel is zero and the last without variance."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight /= weight.abs().amax()
    if shape[0] > 2:
        weight[0], weight[-1] = 0, 0.5
    return (weight * size).to(dtype)


def weights(sizes: dict[torch.dtype, list[float]]) -> st.SearchStrategy[Tensor]:
    """Weights of all shapes in the given types and sizes."""
    typed = [(dtype, size) for dtype in sizes for size in sizes[dtype]]
    seeds = st.integers(0, 10**6)
    shapes = st.sampled_from(SHAPES)
    return st.builds(lambda shape, seed, case: draw_weight(shape, seed, *case), shapes, seeds, st.sampled_from(typed))


specs = st.builds(QuantSpec, st.integers(2, 8), st.sampled_from([0, 1, None]))


def test_the_members_that_quantize_in_training_are_here():
    assert {"lsq", "ste", "dorefa"} <= {name for name, _ in MEMBERS}
    assert ("lsq", {"rounding": "stochastic"}) in MEMBERS


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
@few
@given(weight=weights(SIZES), spec=specs)
def test_evaluation_is_the_dequantized_codes_bit_for_bit(member, weight, spec):
    quantizer = ready(member, weight, spec).eval()
    value, out = quantizer.quantized(weight), quantizer(weight)
    assert value.codes.dtype == torch.int8
    assert value.codes.shape == weight.shape
    assert value.spec.qmin <= value.codes.min() <= value.codes.max() <= value.spec.qmax
    assert value.scale.dtype == torch.float32
    assert value.scale.shape == (1 if spec.axis is None else weight.shape[spec.axis],)
    assert (value.scale > 0).all()
    assert torch.isfinite(value.scale).all()
    assert torch.isfinite(out).all()
    assert out.dtype == weight.dtype
    assert torch.equal(out, value.dequantize().to(weight.dtype))


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
@few
@given(weight=weights(SIZES), spec=specs)
def test_training_has_finite_values_and_gradients(member, weight, spec):
    quantizer = ready(member, weight, spec)
    latent = weight.clone().requires_grad_()
    out = quantizer(latent)
    assert torch.isfinite(out).all()
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    for leaf in (latent, *quantizer.parameters()):
        assert leaf.grad is None or torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
@few
@given(weight=weights(NORMAL), spec=specs)
def test_quantizing_twice_with_the_same_steps_changes_nothing(member, weight, spec):
    quantizer = ready(member, weight, spec).eval()
    once = quantizer.quantized(weight)
    out = quantizer(weight)
    twice = quantizer.quantized(out)
    if quantizer.step_sizes() is None:  # they follow the weight
        return
    assert torch.equal(twice.scale, once.scale)
    assert torch.equal(twice.codes, once.codes)
    assert torch.equal(quantizer(out), out)


@pytest.mark.parametrize("member", MEMBERS, ids=IDS)
def test_the_passes_of_one_step_are_alike_and_memory_format_is_kept(member):
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight.to(memory_format=torch.channels_last)
    quantizer = ready(member, weight, QuantSpec(3))
    first = quantizer(weight).clone()
    torch.rand(1)  # what else is drawn in between does not matter
    assert torch.equal(quantizer(weight), first)
    assert first.is_contiguous(memory_format=torch.channels_last)
    shipped = quantizer.eval()(weight)
    assert torch.equal(quantizer(weight), shipped)
    quantizer.train().begin_step_(weight, 4, LATE)
    changed = not torch.equal(quantizer(weight), first)
    assert changed == (not torch.equal(first, shipped))  # what differs from evaluation is drawn anew in the next step
    assert changed or member[1].get("rounding") != "stochastic"


STOCHASTIC = [member for member in MEMBERS if member[1].get("rounding") == "stochastic"]


@pytest.mark.parametrize("member", STOCHASTIC, ids=[name for name, _ in STOCHASTIC])
@pytest.mark.parametrize("bits", [2, 4])
def test_stochastic_rounding_is_one_of_the_two_neighbours_and_right_on_average(member, bits):
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(bits))
    weight[:, :3] *= 4
    quantizer = ready(member, weight, QuantSpec(bits))
    value = quantizer.quantized(weight)
    scale = value.scale[:, None]
    u = (weight / scale).double()
    low, high = value.spec.qmin, value.spec.qmax
    n_draws, total = 1000, torch.zeros_like(u)
    for seed in range(n_draws):
        quantizer.begin_step_(weight, seed, LATE)
        codes = (quantizer(weight) / scale).double()
        assert ((codes.round() - u.clamp(low, high)).abs() < 1 + 1e-5).all()
        total += codes.round()
    expected = u.clamp(low, high)
    share = expected - expected.floor()
    error = (share * (1 - share) / n_draws).sqrt()
    assert ((total / n_draws - expected).abs() <= 5 * error + 1e-2).all()
    assert (total / n_draws - expected).sum().abs() <= 5 * error.square().sum().sqrt()
    clipped = (u <= low) | (u >= high)
    assert torch.equal((total / n_draws)[clipped], expected[clipped])


@pytest.mark.parametrize("member", STOCHASTIC, ids=[name for name, _ in STOCHASTIC])
def test_without_begin_step_the_draws_come_from_the_global_state(member):
    """For a loop of one's own that makes no such calls."""
    weight = torch.randn(6, 50)
    quantizer = QUANTIZERS[member[0]].make(weight, QuantSpec(3), QuantizerOptions(**member[1]))
    quantizer.enable_(weight)
    torch.manual_seed(0)
    first, second = quantizer(weight), quantizer(weight)
    torch.manual_seed(0)
    assert torch.equal(quantizer(weight), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("member", [member for member in MEMBERS if member[0] == "lsq"], ids=str)
@few
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 6), axis=st.sampled_from([0, 1, None]))
def test_the_gradient_of_lsq_passes_strictly_inside_the_range_and_nowhere_else(member, seed, bits, axis):
    weight = draw_weight((5, 6, 4), seed, torch.float32, 1.0).requires_grad_()
    grad = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(seed + 1))
    quantizer = ready(member, weight.detach(), QuantSpec(bits, axis))
    with torch.no_grad():  # finer than the start, so that something is clipped
        for parameter in quantizer.parameters():
            parameter.sub_(0.7) if "log_scale" in dict(quantizer.named_parameters()) else parameter.mul_(0.5)
    quantizer(weight).backward(grad)
    value = quantizer.quantized(weight)
    u = weight.detach() / value.scale.reshape([-1 if dim == axis else 1 for dim in range(3)])
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad * ((u > value.spec.qmin) & (u < value.spec.qmax)))
