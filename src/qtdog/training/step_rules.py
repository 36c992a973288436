"""Step rules: how a loss becomes an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from qtdog.core.registry import Registry

Backward = Callable[[], Tensor]


class Optimizer(Protocol):
    """The part of an optimizer that a step rule uses (torch's, or accelerate's wrapper of it)."""

    def zero_grad(self) -> None:
        """Forget all gradients."""
        ...

    def step(self) -> None:
        """Update all parameters."""
        ...


class StepRule(Protocol):
    """One update from a function that computes the loss of this step's batch and its gradients."""

    def __call__(self, backward: Backward, optimizer: Optimizer) -> Tensor:
        """Make the update and return the loss before it."""
        ...


STEP_RULES: Registry[StepRule] = Registry("step rule")


@STEP_RULES.register("plain")
def plain_step(backward: Backward, optimizer: Optimizer) -> Tensor:
    """Make one optimizer step on the gradient of the loss.

    Args:
        backward: computes the loss, adds its gradients to the parameters, returns the loss. It may raise, and then
            nothing has moved.
        optimizer: holds the parameters.

    Returns:
        The loss, a scalar.
    """
    optimizer.zero_grad()
    loss = backward()
    optimizer.step()
    return loss
