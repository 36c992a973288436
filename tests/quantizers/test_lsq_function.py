"""LSQ's forward and both gradients, against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtdog.quantizers import lsq as lsq_function
from qtdog.quantizers.lsq import lsq_quantize

SHAPES = {"conv": (12, 5, 3, 3), "linear": (9, 31), "conv1d": (4, 3, 5), "conv3d": (3, 2, 3, 3, 3)}


def formula(weight, scale, grad, qmin, qmax):
    """Esser et al., Eq. 1, 3 and 5, in float64."""
    w, s, g = weight.double(), scale.double(), grad.double()
    u = w / s
    inside = (u > qmin) & (u < qmax)
    codes = u.round().clamp(qmin, qmax)
    d_scale = torch.where(inside, u.round() - u, codes)
    return codes * s, g * inside, (g * d_scale).sum_to_size(scale.shape)


def draw(shape, bits, seed, *, per_channel=True, width=3.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    scale_shape = (shape[0] if per_channel else 1, *[1] * (len(shape) - 1))
    scale = width * (0.5 + torch.rand(scale_shape, generator=generator)) / 2**bits
    return weight, scale, torch.randn(shape, generator=generator)


@settings(deadline=None)
@given(
    st.sampled_from(list(SHAPES)),
    st.integers(2, 8),
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from([1.0, 3.0, 20.0]),
)
def test_forward_and_gradients_are_the_formula(shape, bits, seed, per_channel, width):
    weight, scale, grad = draw(SHAPES[shape], bits, seed, per_channel=per_channel, width=width)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight.requires_grad_()
    scale.requires_grad_()
    result = lsq_quantize(weight, scale, qmin, qmax)
    result.backward(grad)
    expected, d_weight, d_scale = formula(weight.detach(), scale.detach(), grad, qmin, qmax)
    assert weight.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weight.grad.double(), d_weight, rtol=0, atol=0)
    torch.testing.assert_close(scale.grad.double(), d_scale, rtol=1e-4, atol=1e-3)


def test_gradient_of_the_scale_in_float64_is_the_formula_to_the_last_digits():
    weight, scale, grad = (tensor.double() for tensor in draw((6, 40), 4, 0))
    weight.requires_grad_()
    scale.requires_grad_()
    lsq_quantize(weight, scale, -8, 7).backward(grad)
    _, _, d_scale = formula(weight.detach(), scale.detach(), grad, -8, 7)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, d_scale, rtol=1e-10, atol=1e-10)


def test_blocks_change_nothing(monkeypatch):
    weight, scale, grad = draw((64, 33, 3, 3), 4, 5)
    results = []
    for block in (2**30, 1000):
        monkeypatch.setattr(lsq_function, "BLOCK", block)
        w, s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
        out = lsq_quantize(w, s, -8, 7)
        out.backward(grad)
        results.append((out.detach(), w.grad, s.grad))
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1.0, 20.0])
def test_stochastic_rounding_is_the_formula_too(width):
    weight, scale, grad = draw((12, 40), 4, 3, width=width)
    draws = torch.rand(12, 40, generator=torch.Generator().manual_seed(4))
    w, s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    out = lsq_quantize(w, s, -8, 7, draws)
    out.backward(grad)
    u = weight.double() / scale.double()
    codes = (u.floor() + (draws < u - u.floor())).clamp(-8, 7)
    inside = (u > -8) & (u < 7)
    torch.testing.assert_close(out.double(), codes * scale, rtol=1e-6, atol=1e-7)
    assert w.grad is not None
    assert s.grad is not None
    assert torch.equal(w.grad, grad * inside)
    expected = (grad * torch.where(inside, codes - u, codes)).sum(1, keepdim=True)
    torch.testing.assert_close(s.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drawn", [0.0, 1 - 2.0**-24])
def test_points_of_the_grid_stay_whatever_is_drawn(drawn):
    """In float32 the sum of -64 and 0.99999994 would be -63."""
    weight = torch.tensor([63.0, -64.0, -64.3, 63.3, 0.0, -3.0])
    out = lsq_quantize(weight, torch.ones(1), -64, 63, torch.full((6,), drawn))
    assert out.tolist() == [63, -64, -64, 63, 0, -3]


def test_a_scale_that_is_not_learned_changes_no_gradient_of_the_weight():
    for width in (1.0, 20.0):
        weight, scale, grad = draw((8, 30), 4, 2, width=width)
        results = []
        for learned in (True, False):
            w, s = weight.clone().requires_grad_(), scale.clone().requires_grad_(learned)
            lsq_quantize(w, s, -8, 7).backward(grad)
            assert (s.grad is not None) == learned
            results.append(w.grad)
        assert torch.equal(*results)


def test_channels_last_is_kept():
    weight, scale, grad = draw((8, 4, 3, 3), 4, 1)
    weight = weight.to(memory_format=torch.channels_last).requires_grad_()
    out = lsq_quantize(weight, scale, -8, 7)
    out.backward(grad.to(memory_format=torch.channels_last))
    assert weight.grad is not None
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
