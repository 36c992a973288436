"""What an objective is: a loss that knows nothing of optimizer, device or loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qtdog.core.registry import Registry


@dataclass(frozen=True)
class DomainOutputs:
    """What the network said about one source domain's share of the batch.

    Attributes:
        features: penultimate features, shape (n, d).
        logits: class scores before softmax, shape (n, n_classes).
        labels: class indices, int64, shape (n,).
    """

    features: Tensor
    logits: Tensor
    labels: Tensor


class Objective(Protocol):
    """A loss over the outputs of all source domains of one step."""

    def __call__(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss."""
        ...


OBJECTIVES: Registry[Callable[[], Objective]] = Registry("objective")
