"""LSQ against two other implementations of fake quantization with a learned step size: torch's kernel and Brevitas.

Both round first and clip afterwards, in the gradient too: they treat a weight as inside the range until it *rounds* to
a code outside, half a step beyond. With u = w / s there, LSQ (Esser et al., Eq. 3 and 5) has ∂/∂w = 0 and ∂/∂s = the
code at the end, the others have 1 and code - u. Everywhere else all three are the same.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qtdog.quantizers.lsq import lsq_quantize


class Result(NamedTuple):
    value: Tensor
    d_weight: Tensor
    d_scale: Tensor


def draw(bits: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bits)
    scale = 0.5 + torch.rand(shape[0], 1, generator=generator)
    u = (torch.rand(shape, generator=generator) - 0.5) * (2**bits + 3)  # up to some steps beyond both ends
    return u * scale, scale, torch.randn(shape, generator=generator)


def by(function, weight: Tensor, scale: Tensor, grad: Tensor) -> Result:
    weight, scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    value = function(weight, scale)
    value.backward(grad)
    assert weight.grad is not None
    assert scale.grad is not None
    return Result(value.detach(), weight.grad, scale.grad)


def fused(bits: int):
    kernel = torch.ops.aten._fake_quantize_learnable_per_channel_affine
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def quantize(weight: Tensor, scale: Tensor) -> Tensor:
        return kernel(weight, scale.flatten(), torch.zeros(len(scale)), 0, low, high, 1.0)

    return quantize


def brevitas(bits: int):
    from brevitas.core.function_wrapper import Identity, RoundSte, TensorClamp
    from brevitas.core.quant.int_base import IntQuant

    quant = IntQuant(
        narrow_range=False,
        signed=True,
        input_view_impl=Identity(),
        float_to_int_impl=RoundSte(),
        tensor_clamp_impl=TensorClamp(),
    )

    def quantize(weight: Tensor, scale: Tensor) -> Tensor:
        return quant(scale, torch.tensor(0.0), torch.tensor(float(bits)), weight)

    return quantize


@pytest.mark.parametrize("other", [fused, brevitas])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_lsq_differs_only_within_half_a_step_beyond_the_range_and_there_as_derived(bits, other):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight, scale, grad = draw(bits, (20_000, 1))  # one weight per step, so that each has its own ∂/∂s
    ours = by(lambda w, s: lsq_quantize(w, s, low, high), weight, scale, grad)
    theirs = by(other(bits), weight, scale, grad)
    u = weight / scale
    # a product with 1 / s may lie on the other side of a tie than the quotient
    sure = ((u - u.floor()) - 0.5).abs() > 1e-4
    assert sure.float().mean() > 0.99
    just = ((u > low - 0.5) & (u <= low)) | ((u >= high) & (u < high + 0.5))
    same = sure & ~just
    far = sure & ((u < low - 0.5) | (u > high + 0.5))
    assert min((sure & just).sum(), far.sum(), (same & ~far).sum()) > 50
    torch.testing.assert_close(ours.value[sure], theirs.value[sure], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.d_weight[same], theirs.d_weight[same], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.d_scale[same], theirs.d_scale[same], rtol=1e-4, atol=1e-4)
    code = u.clamp(low, high).round()
    expected = [torch.zeros_like(grad), grad * code, grad, grad * (code - u)]
    found = [ours.d_weight, ours.d_scale, theirs.d_weight, theirs.d_scale]
    for one, derived in zip(found, expected, strict=True):
        torch.testing.assert_close(one[sure & just], derived[sure & just], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", [fused, brevitas])
@pytest.mark.parametrize("bits", [2, 7])
def test_the_gradients_of_a_shared_step_are_summed_alike(bits, other):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight, scale, grad = draw(bits, (20, 50))
    u = weight / scale
    beyond = (u <= low) & (u > low - 0.51) | (u >= high) & (u < high + 0.51)
    tie = ((u - u.floor()) - 0.5).abs() < 1e-3
    weight = torch.where(beyond | tie, torch.zeros_like(weight), weight)
    ours = by(lambda w, s: lsq_quantize(w, s, low, high), weight, scale, grad)
    theirs = by(other(bits), weight, scale, grad)
    torch.testing.assert_close(ours.value, theirs.value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.d_weight, theirs.d_weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.d_scale, theirs.d_scale, rtol=1e-4, atol=1e-3)
