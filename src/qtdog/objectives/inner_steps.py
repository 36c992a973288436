"""Inner gradient steps: losses at other values of the parameters, and how what they give reaches the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from qtdog.objectives.view import ModelView, gradients

Tensors = Mapping[str, Tensor]


def loss_and_gradients(
    view: ModelView, parameters: Tensors, images: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean cross-entropy with other values of the parameters, and its gradient there.

    Args:
        view: the model.
        parameters: name to value, each of which requires a gradient.
        images: shape (n, C, H, W).
        labels: int64, shape (n,).

    Returns:
        The loss, detached, and the gradient of each parameter that it reaches.
    """
    loss = cross_entropy(view.logits_with(parameters, images), labels)
    return loss.detach(), gradients(loss, parameters)


def moved(parameters: Tensors, gradient: Tensors, lr: float) -> dict[str, Tensor]:
    """Return the parameters after one step of gradient descent, as leaves of their own; the given ones stay.

    Example:
        >>> import torch
        >>> moved({"w": torch.tensor(3.0), "unused": torch.tensor(1.0)}, {"w": torch.tensor(6.0)}, 0.5)
        {'w': tensor(0., requires_grad=True), 'unused': tensor(1.)}
    """
    stepped = {name: (parameters[name].detach() - lr * grad).requires_grad_() for name, grad in gradient.items()}
    return {**parameters, **stepped}


def add_(total: dict[str, Tensor], gradient: Tensors, factor: float = 1.0) -> None:
    """Add `factor` times a gradient to `total`, in place.

    Example:
        >>> import torch
        >>> total = {"w": torch.tensor(1.0)}
        >>> add_(total, {"w": torch.tensor(2.0), "v": torch.tensor(1.0)}, 10)
        >>> total
        {'w': tensor(21.), 'v': tensor(10.)}
    """
    for name, grad in gradient.items():
        total[name] = total[name] + factor * grad if name in total else factor * grad


class _Given(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, given: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.given = given
        return value.clone()

    @staticmethod
    @once_differentiable  # its type makes ctx positional-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, *(grad_outputs[0] * grad for grad in ctx.given)


def with_gradients(value: Tensor, parameters: Tensors, gradient: Tensors) -> Tensor:
    """Return a scalar that is `value`, and whose gradient is the given one; other parameters get none.

    Example:
        >>> import torch
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> loss = with_gradients(torch.tensor(7.0), {"w": w}, {"w": torch.tensor(-1.0)})
        >>> (2 * loss).backward()
        >>> loss.item(), w.grad.item()
        (7.0, -2.0)
    """
    return _Given.apply(value, list(gradient.values()), *(parameters[name] for name in gradient))
