"""The straight-through estimator: a value that is not differentiable, with the gradient of one that is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)  # a new tensor, since autograd may not return an input as it is

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """Return `value`, bit for bit, whose gradient passes to `source` as if it were `source` (Bengio et al., 2013).

    Written source + (value - source).detach(), the result may be rounded twice more and leave the grid.

    Args:
        source: what gets the gradient.
        value: same shape and type; no gradient passes to it.

    Example:
        >>> import torch
        >>> weight = torch.tensor([0.3, 1.6], requires_grad=True)
        >>> result = straight_through(weight, weight.detach().round())
        >>> (2 * result).sum().backward()
        >>> result.tolist(), weight.grad.tolist()
        ([0.0, 2.0], [2.0, 2.0])
    """
    return _StraightThrough.apply(source, value)
