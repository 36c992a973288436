import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import encode


@settings(deadline=None)
@given(bits=st.integers(2, 8), axis=st.sampled_from([0, 1, None]), seed=st.integers(0, 2**31))
def test_codes_are_the_nearest_points_of_the_grid(bits: int, axis: int | None, seed: int) -> None:
    weight = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed))
    n_scales = 1 if axis is None else weight.shape[axis]
    scale = torch.rand(n_scales, generator=torch.Generator().manual_seed(seed + 1)) + 0.01
    spec = QuantSpec(bits, axis)

    value = encode(weight, scale, spec)

    levels = torch.arange(spec.qmin, spec.qmax + 1)
    shape = [1, 1, 1] if axis is None else [n_scales if dim == axis else 1 for dim in range(3)]
    ratio = weight.double() / scale.double().reshape(shape)
    nearest = levels[(ratio[..., None] - levels).abs().argmin(-1)]
    assert value.codes.dtype == torch.int8
    assert torch.equal(value.codes.long(), nearest)


def test_halves_round_to_even() -> None:
    codes = encode(torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]]), torch.ones(1), QuantSpec(4)).codes
    assert codes.tolist() == [[0, 2, 2, 0, -2]]


def test_the_codes_do_not_follow_later_changes_of_weight_and_scale() -> None:
    weight, scale = torch.ones(2, 2), torch.ones(2)
    value = encode(weight, scale, QuantSpec(4))
    weight.zero_()
    scale.zero_()
    assert value.dequantize().tolist() == [[1, 1], [1, 1]]


def test_codes_keep_the_memory_format() -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert encode(weight, torch.ones(4), QuantSpec(4)).codes.is_contiguous(memory_format=torch.channels_last)
