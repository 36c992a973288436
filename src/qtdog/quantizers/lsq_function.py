"""LSQ's quantization as a differentiable function, in as few passes over memory as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# On a CPU a weight is worked on in blocks of about this many values, so that every pass but the first finds them in the
# processor's cache; a GPU takes the whole tensor at once.
BLOCK = 2**18

_mask = torch.ops.aten.hardtanh_backward  # (g, u, low, high): g where low < u < high, else 0


def lsq_quantize(weight: Tensor, scale: Tensor, qmin: int, qmax: int, draws: Tensor | None = None) -> Tensor:
    """Return scale · clamp(round(weight / scale), qmin, qmax), with LSQ's straight-through gradients.

    With draws r from U[0, 1) rounding is stochastic: floor(u), or one more where r < u - floor(u), so that its mean is
    u inside the range (Gupta et al., ICML 2015, section 2.2). That is floor(u + r) with 1 - r for r, but free of the
    rounding of a sum. The gradients are the same, with the rounding that was drawn in place of round(u).

    With u = weight / scale and Esser et al. (ICLR 2020), Eq. 3 and 5:

        ∂/∂weight = 1                 where qmin < u < qmax, else 0
        ∂/∂scale  = round(u) - u      where qmin < u < qmax,
                    qmin              where u ≤ qmin,
                    qmax              where u ≥ qmax

    The gradient of a scale is summed over the weights that share it; LSQ's gradient scale is not applied here. Rounding
    is half to even, as in `encode`, whose codes times scale are this function's result bit for bit.

    Args:
        weight: float32 or float64, any shape and memory format, which result and gradient keep.
        scale: positive step sizes, same type, a shape that broadcasts to that of `weight`.
        qmin: smallest code.
        qmax: largest code.
        draws: r, same type, shape and memory format as `weight`; None rounds to nearest.

    Raises:
        RuntimeError: the shapes do not broadcast.

    Example:
        >>> weight = torch.tensor([0.3, -0.9, 5.0], requires_grad=True)
        >>> scale = torch.tensor([0.5], requires_grad=True)
        >>> result = lsq_quantize(weight, scale, -4, 3)
        >>> result.tolist()
        [0.5, -1.0, 1.5]
        >>> result.sum().backward()
        >>> weight.grad.tolist(), round(scale.grad.item(), 4)  # 0.4 - 0.2 + 3
        ([1.0, 1.0, 0.0], 3.2)
    """
    missing = weight.ndim - scale.ndim
    steps = scale.reshape((1,) * missing + scale.shape) if missing else scale
    return _Quantize.apply(weight, steps, draws, (qmin, qmax))


class _Quantize(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, draws: Tensor | None, ends: tuple[int, int]) -> Tensor:
        result = torch.empty_like(weight)
        ctx.ends, ctx.clipped = ends, False
        others = (scale, result) if draws is None else (scale, result, draws)
        for part, steps, out, *drawn in _blocks(weight, *others):
            torch.div(part, steps, out=out)
            leaves = _may_leave(out, *ends)
            ctx.clipped |= leaves
            if drawn:
                below = out.floor()
                out.copy_(below + (drawn[0] < out - below))
            if leaves:
                out.clamp_(*ends)
            out.round_().add_(0.0).mul_(steps)  # adding zero makes -0 the 0 that an integer code is
        ctx.save_for_backward(weight, scale, result)
        return result

    @staticmethod
    @once_differentiable  # its type makes ctx positional-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,) = grad_outputs
        weight, scale, result = ctx.saved_tensors
        learned = ctx.needs_input_grad[1]
        # If nothing is clipped the gradient passes as it is: no second tensor of the weight's size is touched.
        grad_weight = torch.empty_like(weight) if ctx.clipped else grad
        grad_scale = torch.zeros_like(scale)
        for part, steps, out, given, passed, summed in _blocks(weight, scale, result, grad, grad_weight, grad_scale):
            inside, free = part, None
            if ctx.clipped:
                ratio = part / steps
                _mask.grad_input(given, ratio, *ctx.ends, grad_input=passed)
                inside = free = _mask.grad_input(part, ratio, *ctx.ends, grad_input=ratio)
            if learned:
                error = torch.sub(out, inside, out=free)
                summed += error.mul_(given).sum_to_size(steps.shape)
        return grad_weight, grad_scale.div_(scale) if learned else None, None, None


def _blocks(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield cache-sized slices of `weight` along its first dimension, each with the slices of the others."""
    if weight.device.type != "cpu" or weight.numel() <= BLOCK:
        yield weight, *others
        return
    n_rows = max(1, BLOCK * weight.shape[0] // weight.numel())
    for start in range(0, weight.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        yield weight[rows], *(other[rows] if other.shape[0] > 1 else other for other in others)


def _may_leave(ratio: Tensor, qmin: int, qmax: int) -> bool:
    """Return False only if all values lie strictly inside; on a GPU True without looking, which would stall it."""
    if ratio.device.type != "cpu" or not ratio.numel():
        return True
    low, high = torch.aminmax(ratio)
    return not (low > qmin and high < qmax)
