import pytest
import torch

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import QuantizerOptions, straight_through
from qtdog.quantizers.ste import STE


def enabled(weight, spec, **options):
    ste = STE(weight, spec, QuantizerOptions(**options))
    ste.enable_(weight)
    return ste


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize(("range_", "low"), [("asymmetric", -8), ("symmetric", -7)])
def test_the_grid_spans_the_weights_of_now(axis, range_, low):
    weight = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    ste = enabled(weight, QuantSpec(4, axis), range=range_)
    for factor in (1.0, 3.0):
        value = ste.quantized(weight * factor)
        dims = tuple(dim for dim in range(3) if dim != axis)
        expected = torch.maximum(weight.double().amax(dims) / 7, weight.double().amin(dims) / low) * factor
        torch.testing.assert_close(value.scale.double(), expected.reshape(-1), rtol=1e-6, atol=0)
        assert ((value.codes.amax(dims) == 7) | (value.codes.amin(dims) == low)).all()
        assert value.codes.min() >= low
        u = (weight * factor).double() / expected.reshape([-1 if dim == axis else 1 for dim in range(3)])
        assert (value.codes - u).abs().max() < 0.5 + 1e-5


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_gradient_passes_as_if_there_were_no_rounding(rounding):
    weight = torch.randn(5, 8, requires_grad=True)
    grad = torch.randn(5, 8)
    ste = enabled(weight, QuantSpec(2), rounding=rounding)
    ste(weight).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad)


def test_quantizing_again_keeps_the_codes_though_the_grid_is_found_anew():
    weight = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    for bits in (2, 5, 8):
        ste = enabled(weight, QuantSpec(bits))
        once, twice = ste.quantized(weight), ste.quantized(ste(weight))
        assert torch.equal(once.codes, twice.codes)
        torch.testing.assert_close(once.scale, twice.scale, rtol=1e-6, atol=0)


def test_straight_through_keeps_the_value_to_the_last_bit_where_the_detach_trick_does_not():
    source = torch.randn(1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = ((source.detach() * 3).floor() + 0.5) / 3  # far from the source near zero, so that the difference rounds
    trick = source + (value - source).detach()
    assert not torch.equal(trick, value)
    assert torch.equal(straight_through(source, value), value)
