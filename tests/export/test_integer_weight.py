import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.quantized import LEVELS, QuantizedTensor, QuantSpec
from qtdog.export.integer_weight import SAFE, IntegerWeight, fit, seven_bits

SHAPES = [(4, 3, 3, 3), (6, 1, 3, 3), (5, 7)]


def random_value(seed: int, bits: int, levels: str, shape: tuple[int, ...], axis: int | None = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(bits, axis, levels)
    codes = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator).to(torch.int8)
    scale = torch.rand(shape[0] if axis == 0 else 1, generator=generator) * 0.01 + 1e-4
    return QuantizedTensor(codes, scale, spec)


grids = st.tuples(st.integers(0, 2**32), st.integers(2, 8), st.sampled_from(LEVELS), st.sampled_from(SHAPES))


@given(grids, st.sampled_from([0, None]))
def test_codes_survive_any_factor_per_output_channel(grid, axis):
    value = random_value(*grid, axis=axis)
    factors = np.random.default_rng(0).normal(size=value.codes.shape[0]).astype(np.float32)
    factors[0] = 0  # a channel that batch norm switches off
    spread = factors.reshape(-1, *[1] * (value.codes.ndim - 1))
    folded = value.dequantize().numpy() * spread
    found = fit(folded, value)
    assert found is not None
    assert np.array_equal(found.codes, value.codes.numpy())
    np.testing.assert_allclose(found.dequantize(), folded, rtol=1e-6)


def test_a_transposed_matrix_is_recognized_with_its_channels_along_the_second_axis():
    value = random_value(0, 7, "uniform", (5, 7))
    found = fit(value.dequantize().numpy().T.copy(), value)
    assert found is not None
    assert found.axis == 1
    np.testing.assert_allclose(found.dequantize(), value.dequantize().numpy().T, rtol=1e-6)


def test_a_weight_with_one_entry_changed_is_not_taken_for_the_codes():
    value = random_value(0, 7, "uniform", (5, 7))
    weight = value.dequantize().numpy().copy()
    weight[2, 3] += 1e-3
    assert fit(weight, value) is None


@given(grids)
def test_integer_weights_never_saturate_sixteen_bits(grid):
    value = random_value(*grid)
    weight = fit(value.dequantize().numpy(), value)
    assert weight is not None
    codes, scale, _ = seven_bits(weight)
    # a processor without VNNI adds two products of an unsigned and a signed byte in 16 bits
    worst = 2 * 255 * np.abs(codes.astype(np.int64)).max()
    assert worst <= 2**15 - 1
    assert (scale > 0).all()


@given(grids)
def test_seven_bits_stay_exact_where_whole_numbers_can_say_them(grid):
    seed, bits, levels, shape = grid
    enough = {"uniform": 7, "symmetric": 7, "half": 6, "power_of_two": 4}[levels]
    value = random_value(seed, min(bits, enough), levels, shape)
    weight = fit(value.dequantize().numpy() * np.float32(-1), value)
    assert weight is not None
    codes, scale, exact = seven_bits(weight)
    assert exact
    again = IntegerWeight(codes, None, -SAFE, scale, 0).dequantize()
    np.testing.assert_allclose(again, weight.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "levels"), [(8, "uniform"), (7, "half"), (7, "power_of_two")])
def test_what_has_no_seven_bit_codes_is_rounded_to_half_a_step_and_says_so(bits, levels):
    value = random_value(1, bits, levels, (4, 3, 3, 3))
    weight = fit(value.dequantize().numpy(), value)
    assert weight is not None
    codes, scale, exact = seven_bits(weight)
    assert not exact
    error = np.abs(codes * scale.reshape(-1, 1, 1, 1) - weight.dequantize())
    assert (error <= scale.reshape(-1, 1, 1, 1) * 0.5001).all()
