"""SMA: the simple moving average behind an ensemble of averages (Arpit et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.training.average import Average
from qtdog.training.averagers import AVERAGERS, Averager, State


@AVERAGERS.register("sma")
class SMA(Averager):
    """The mean of all updates from an early one on, selected in place of the weights (Arpit et al., 2022).

    Formula: θ̂_t = ((t - t0) · θ̂_(t-1) + θ_t) / (t - t0 + 1) for t ≥ t0, θ̂_t = θ_t before (Eq. 1); t0 = 100, or the
    first update that may count if that is later. Every evaluation is of θ̂, so selection by source validation chooses
    among the averages, as the paper does.

    Example:
        >>> import torch
        >>> network, sma = nn.Linear(1, 1, bias=False), SMA({"start": 2}, 0)
        >>> for step in range(1, 5):
        ...     _ = network.weight.data.fill_(step)
        ...     sma.after_step(step, network)
        >>> sma.evaluated()["weight"].item(), sma.kept(4)  # of 2, 3 and 4
        (3.0, 'average of updates 2 to 4')
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "start": HyperParameter(100, "t0, the first update that counts", low=0),
    }

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        super().__init__(params, start)
        self.begin = max(int(self.params["start"]), start + 1)
        self.average = Average()

    def after_step(self, step: int, network: nn.Module) -> None:
        """Count the weights, from t0 on."""
        if step >= self.begin:
            self.average.add_(step, network.state_dict())

    def evaluated(self) -> State | None:
        """Return the average so far, or None before t0."""
        return self.average.mean or None

    def kept(self, step: int) -> str:
        """Return in words what ships, if selection chose the evaluation after update `step`."""
        if self.average.n and step >= self.average.first:
            return f"average of updates {self.average.first} to {step}"
        return f"{super().kept(step)} (chosen before update {self.begin}, from which sma averages)"

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the average."""
        return self.average.tensors(""), self.average.to_json()

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:
        """Put back what `state` returned (KeyError if something is missing)."""
        self.average = Average.restored("", tensors, extra)
