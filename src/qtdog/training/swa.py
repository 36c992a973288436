"""SWA: stochastic weight averaging (Izmailov et al., UAI 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.training.average import Average
from qtdog.training.averagers import AVERAGERS, Averager, State


@AVERAGERS.register("swa")
class SWA(Averager):
    """The mean of every n-th update from a fixed one on; it ships whatever selection says (Izmailov et al., 2018).

    Formula: θ̂ = 1/K · Σ_k θ_(b + k·every), k = 0 … K - 1, with b = max(start, first update that may count). The paper
    averages the end of each cycle of a cyclic learning rate, or one in several steps of a constant one, which is the
    protocol's; the choice of b and of `every` (an epoch of PACS is about 50 steps) is ours. Evaluations during the run
    are of the weights as they are. A run that ends before b ships the selected checkpoint.

    Example:
        >>> import torch
        >>> network, swa = nn.Linear(1, 1, bias=False), SWA({"start": 2, "every": 2}, 0)
        >>> for step in range(1, 6):
        ...     _ = network.weight.data.fill_(step)
        ...     swa.after_step(step, network)
        >>> swa.final()["weight"].item(), swa.kept(5)  # of 2 and 4
        (3.0, 'average of updates 2 to 4, every 2')
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "start": HyperParameter(100, "first update that counts", low=0),
        "every": HyperParameter(50, "updates from one that counts to the next", low=1),
    }

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        super().__init__(params, start)
        self.begin = max(int(self.params["start"]), start + 1)
        self.every = int(self.params["every"])
        self.average = Average()

    def after_step(self, step: int, network: nn.Module) -> None:
        """Count the weights if it is their turn."""
        if step >= self.begin and (step - self.begin) % self.every == 0:
            self.average.add_(step, network.state_dict())

    def evaluated(self) -> State | None:
        """Return None: the weights as they are."""
        return None

    def final(self) -> State | None:
        """Return the average, or None before the first update that counts."""
        return self.average.mean or None

    def kept(self, step: int) -> str:
        """Return in words what ships."""
        if self.average.n:
            return f"{self.average}, every {self.every}"
        return f"{super().kept(step)} (the run ended before update {self.begin}, from which swa averages)"

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the average."""
        return self.average.tensors(""), self.average.to_json()

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:
        """Put back what `state` returned (KeyError if something is missing)."""
        self.average = Average.restored("", tensors, extra)
