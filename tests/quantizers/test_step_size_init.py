"""The starts: each against its formula in float64, the search against a fine grid, and what no start may break on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import encode
from qtdog.quantizers.step_size_init import DEAD_LAYER_SCALE, STEP_SIZE_INITS, initial_scale, mse_init

SPECS = [
    QuantSpec(bits, axis, levels) for bits in (2, 4, 7) for axis in (0, 1, None) for levels in ("uniform", "symmetric")
]


def groups(weight, axis):
    """The weights that share a step size, one float64 row each."""
    return [weight.double().flatten()] if axis is None else [row.double().flatten() for row in weight.unbind(axis)]


def lsq(row, spec):
    return 2 * row.abs().mean() / math.sqrt(spec.qmax)


def lsq_plus(row, spec):
    sigma = ((row - row.mean()) ** 2).mean().sqrt()
    return max((row.mean() - 3 * sigma).abs(), (row.mean() + 3 * sigma).abs()) / 2 ** (spec.bits - 1)


def minmax(row, spec):
    return max(row.max() / spec.qmax, row.min() / spec.qmin)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("formula", [lsq, lsq_plus, minmax])
def test_a_start_is_its_formula(spec, formula):
    weight = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1)) + 0.3
    expected = torch.stack([torch.as_tensor(formula(row, spec)) for row in groups(weight, spec.axis)])
    torch.testing.assert_close(initial_scale(weight, spec, formula.__name__).double(), expected, rtol=1e-5, atol=0)


@settings(deadline=None)
@given(st.integers(2, 8), st.sampled_from(["uniform", "symmetric"]), st.integers(0, 10**6))
def test_minmax_is_the_smallest_step_that_clips_nothing(bits, levels, seed):
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)).double()
    spec = QuantSpec(bits, 0, levels)
    scale = initial_scale(weight, spec, "minmax").double()[:, None]
    for factor, fits in ((1 + 1e-6, True), (1 - 1e-6, False)):
        ratio = weight / (scale * factor)
        assert (((ratio >= spec.qmin) & (ratio <= spec.qmax)).all(dim=1) == fits).all()


def squared_error(rows, scale, spec):
    return (encode(rows, scale, spec).dequantize() - rows).double().square().sum(dim=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("tail", [0, 2])
def test_mse_has_the_smallest_squared_error_of_a_fine_grid(bits, tail):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(12, 300, generator=generator) * torch.randn(12, 300, generator=generator).abs() ** tail
    spec = QuantSpec(bits)
    found = squared_error(rows, mse_init(rows, spec), spec)
    widest = initial_scale(rows, spec, "minmax")
    grid = torch.stack([squared_error(rows, widest * 2.0 ** (-k / 300), spec) for k in range(-600, 2100)])
    ratio = found / grid.amin(dim=0)
    assert ratio.max() < 1.03
    assert ratio.median() < 1.003
    for other in ("lsq", "lsq_plus", "minmax"):
        assert (found <= squared_error(rows, initial_scale(rows, spec, other), spec) * (1 + 1e-5)).all()


def test_mse_finds_a_grid_that_holds_the_weights_exactly():
    rows = torch.tensor([[3.0, -4.0, 1.0, 2.0], [0.3, -0.4, 0.0, 0.2], [7.0, 7.0, 7.0, 7.0]])
    assert squared_error(rows, mse_init(rows, QuantSpec(3)), QuantSpec(3)).tolist() == pytest.approx(
        [0, 0, 0], abs=1e-12
    )


@pytest.mark.parametrize("init", list(STEP_SIZE_INITS))
def test_dead_filters_get_the_mean_of_the_living_and_a_dead_layer_its_own_start(init):
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    living = initial_scale(weight[[0, 3]], QuantSpec(7), init)
    weight[1] = 0
    weight[2] *= 1e-12
    scale = initial_scale(weight, QuantSpec(7), init)
    torch.testing.assert_close(scale, torch.stack([living[0], living.mean(), living.mean(), living[1]]))
    for dead in (torch.zeros(2, 3), torch.full((2, 3), 1e-42)):
        assert (initial_scale(dead, QuantSpec(7), init) == DEAD_LAYER_SCALE).all()
        assert (initial_scale(dead, QuantSpec(7, None), init) == DEAD_LAYER_SCALE).all()


@pytest.mark.parametrize("init", list(STEP_SIZE_INITS))
def test_a_start_scales_with_the_weights_exactly(init):
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    scale = initial_scale(weight, QuantSpec(4), init)
    for power in (-100, -20, 20, 100):
        assert torch.equal(initial_scale(weight * 2.0**power, QuantSpec(4), init), scale * 2.0**power)


@pytest.mark.parametrize("init", list(STEP_SIZE_INITS))
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.float16, 1e-7), (torch.bfloat16, 3e38), (torch.float32, 3e38)]
)
def test_steps_are_positive_and_every_point_is_finite_at_the_ends_of_the_types(init, dtype, size):
    weight = (torch.tensor([[0.9, -1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1e-3, 0.0, -1.0]]) * size).to(dtype)
    for bits in (2, 8):
        spec = QuantSpec(bits)
        scale = initial_scale(weight, spec, init)
        assert scale.dtype == torch.float32
        assert (scale > 0).all()
        assert torch.isfinite(scale[:, None] * spec.points()).all()
        assert torch.isfinite((scale[:, None] * spec.points()).to(dtype)).all()


@pytest.mark.parametrize("init", list(STEP_SIZE_INITS))
def test_a_start_does_not_depend_on_the_memory_format_and_leaves_the_weight_alone(init):
    weight = torch.randn(4, 3, 2, 2)
    other = weight.clone().to(memory_format=torch.channels_last)
    torch.testing.assert_close(initial_scale(weight, QuantSpec(4), init), initial_scale(other, QuantSpec(4), init))
    assert torch.equal(weight, other)
