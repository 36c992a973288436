"""Step rules: how a loss becomes an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from qtdog.core.registry import HyperParameters, Registry, Value, fill


class Optimizer(Protocol):
    """The part of an optimizer that a step rule uses (torch's, or accelerate's wrapper of it)."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        ...

    def step(self) -> None:
        """Update all parameters."""
        ...


@dataclass(frozen=True)
class Update:
    """What a step rule works on.

    Attributes:
        backward: computes the loss of this step's batch, adds its gradients to the parameters, returns the loss. Called
            again it sees the same batch and draws the same noise. It may raise, and then the rule must leave the
            parameters as they were.
        optimizer: holds the parameters.
        network: the plain network, quantizers attached.
    """

    backward: Callable[[], Tensor]
    optimizer: Optimizer
    network: nn.Module


class StepRule(ABC):
    """One update; abstract.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        N_PASSES: forward and backward passes per update, for the accounting of cost.
        params: the values of the hyper-parameters.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    N_PASSES: ClassVar[int] = 1

    def __init__(self, params: Mapping[str, Value]) -> None:
        self.params = fill(f"step rule '{type(self).__name__}'", self.HYPERPARAMETERS, params)

    @abstractmethod
    def __call__(self, update: Update) -> Tensor:
        """Make the update and return the loss before it, a scalar."""


STEP_RULES: Registry[type[StepRule]] = Registry("step rule")


@STEP_RULES.register("plain")
class Plain(StepRule):
    """One optimizer step on the gradient of the loss."""

    def __call__(self, update: Update) -> Tensor:
        """Make the update and return the loss before it."""
        update.optimizer.zero_grad()
        loss = update.backward()
        update.optimizer.step()
        return loss
