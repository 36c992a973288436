"""DoReFa against the paper's formula in float64, by plain autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.ste import DoReFa


def enabled(weight, spec):
    dorefa = DoReFa(weight, spec)
    dorefa.enable_(weight)
    return dorefa


def paper(weight, bits, axis):
    """Zhou et al., Eq. 9, times the maximum; float64, with the straight-through rounding written out."""
    squeezed = weight.tanh()
    dims = [dim for dim in range(weight.ndim) if dim != axis]
    largest = squeezed.detach().abs().amax(dims, keepdim=True)
    x = (2**bits - 1) * (squeezed / (2 * largest) + 0.5)
    rounded = x + (x.round() - x).detach()
    return largest * (2 * rounded / (2**bits - 1) - 1), x.detach()


@settings(deadline=None)
@given(st.integers(2, 8), st.sampled_from([0, 1, None]), st.sampled_from([0.05, 1.0, 4.0]), st.integers(0, 10**6))
def test_forward_and_gradient_are_the_papers(bits, axis, width, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = width * torch.randn(4, 5, 6, generator=generator)
    grad = torch.randn(4, 5, 6, generator=generator)
    ours, theirs = weight.clone().requires_grad_(), weight.double().requires_grad_()
    out = enabled(weight, QuantSpec(bits, axis))(ours)
    expected, x = paper(theirs, bits, axis)
    out.backward(grad)
    expected.backward(grad.double())
    no_tie = ((x - x.floor()) - 0.5).abs() > 1e-3
    assert no_tie.float().mean() > 0.9
    torch.testing.assert_close(out.double()[no_tie], expected[no_tie], rtol=1e-4, atol=1e-6)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


def test_the_grid_ends_at_the_largest_magnitude_and_has_no_zero():
    weight = torch.tensor([[0.0, 0.3, -0.5]])
    value = enabled(weight, QuantSpec(3)).quantized(weight)
    assert value.spec.levels == "half"
    assert value.codes.tolist() == [[0, 2, -4]]
    points = value.dequantize()
    assert points[0, 2].item() == pytest.approx(weight.tanh()[0, 2].item(), rel=1e-6)
    assert points[0, 0].item() == pytest.approx(value.scale.item() / 2)


def test_many_bits_leave_a_pretrained_weight_nearly_what_it_was():
    weight = 0.05 * torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    out = enabled(weight, QuantSpec(8))(weight)
    assert ((out - weight).abs() / weight.abs().amax()).max() < 0.01


def test_a_dead_filter_stays_next_to_nothing_and_can_train():
    weight = torch.zeros(2, 4)
    weight[0] = 1.0
    weight.requires_grad_()
    out = enabled(weight, QuantSpec(4))(weight)
    assert (out[1].abs() < 1e-30).all()
    out.sum().backward()
    assert weight.grad is not None
    assert (weight.grad[1] == 1).all()
