import pytest
import torch

from qtdog.core.quantized import QuantizedTensor, QuantSpec


@pytest.mark.parametrize("bits", [1, 9, 0, -3])
def test_bits_outside_the_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, not {bits}"):
        QuantSpec(bits)


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (7, -64, 63), (8, -128, 127)])
def test_code_range_is_that_of_signed_integers(bits, low, high):
    assert (QuantSpec(bits).qmin, QuantSpec(bits).qmax) == (low, high)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_dequantize_multiplies_along_the_axis(axis):
    codes = torch.tensor([[1, -2, 3], [0, 1, -4]], dtype=torch.int8)
    scale = {0: torch.tensor([0.5, 2.0]), 1: torch.tensor([1.0, 0.1, 10.0]), None: torch.tensor([0.25])}[axis]
    weights = QuantizedTensor(codes, scale, QuantSpec(4, axis)).dequantize()
    for i in range(2):
        for j in range(3):
            step = scale[i if axis == 0 else j if axis == 1 else 0]
            assert weights[i, j] == codes[i, j] * step
