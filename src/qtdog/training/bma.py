"""BMA: the Beta moving average of CLIPood (Shu et al., ICML 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.training.average import Average
from qtdog.training.averagers import AVERAGERS, Averager, State


@AVERAGERS.register("bma")
class BMA(Averager):
    """The mean of all updates, those at both ends counting most; it ships whatever selection says (Shu et al., 2023).

    Formula: θ̂ = Σ_k a_k θ_k / Σ_k a_k over the K updates that may count, k = 0 … K - 1, with a_k the density of
    Beta(β, β) at (k + 0.5) / K, which is proportional to (x (1 - x))^(β - 1). The paper's first θ is the pretrained
    network itself, ours the one after the first update that may count: of thousands its share is below 1 %.
    Evaluations during the run are of the weights as they are. A run that stops early has no average that means this.

    Example:
        >>> import torch
        >>> network, bma = nn.Linear(1, 1, bias=False), BMA({"beta": 1.0}, 0)
        >>> bma.n_steps = 3
        >>> for step in range(1, 4):
        ...     _ = network.weight.data.fill_(step)
        ...     bma.after_step(step, network)
        >>> bma.final()["weight"].item(), bma.kept(3)  # with β = 1 all count alike
        (2.0, 'Beta average of updates 1 to 3')
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "beta": HyperParameter(0.5, "β: below 1 both ends count most, at 1 all alike", low=0.01, high=10.0),
    }

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        super().__init__(params, start)
        self.average = Average()
        self.total = 0.0

    def after_step(self, step: int, network: nn.Module) -> None:
        """Count the weights by their place in the run."""
        if step < self.begin:
            return
        place = (step - self.begin + 0.5) / (max(self.n_steps, step) - self.begin + 1)
        weight = (place * (1 - place)) ** (float(self.params["beta"]) - 1)
        self.total += weight
        self.average.add_(step, network.state_dict(), self.total / weight)

    def evaluated(self) -> State | None:
        """Return None: the weights as they are."""
        return None

    def final(self) -> State | None:
        """Return the average, or None before the first update that counts."""
        return self.average.mean or None

    def kept(self, step: int) -> str:
        """Return in words what ships."""
        return f"Beta {self.average}" if self.average.n else super().kept(step)

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the average and the sum of its weights."""
        return self.average.tensors(""), self.average.to_json() | {"total": self.total}

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:
        """Put back what `state` returned (KeyError if something is missing)."""
        self.average, self.total = Average.restored("", tensors, extra), extra["total"]
