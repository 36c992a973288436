"""The running mean of weights that all averagers are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtdog.training.averagers import State, float_names


class Average:
    """The mean of a network's floating point state over some updates, float32, on the device of the network.

    Formula: θ̂ += (θ - θ̂) / n. Each of its three operations is rounded by itself, so that the result does not depend on
    how tensors lie in memory, and an entry that never changes stays what it is, bit for bit.

    Attributes:
        mean: entry name → mean; empty before the first.
        n: how many were averaged.
        first: number of the first update.
        last: number of the last update.

    Example:
        >>> average = Average()
        >>> average.add_(5, {"w": torch.tensor(1.0)})
        >>> average.add_(6, {"w": torch.tensor(2.0)})
        >>> average.mean["w"].item(), average.n, average.first, average.last
        (1.5, 2, 5, 6)
    """

    def __init__(self) -> None:
        self.mean: State = {}
        self.n = 0
        self.first = 0
        self.last = 0

    @torch.no_grad()
    def add_(self, step: int, state: Mapping[str, Tensor], share: float | None = None) -> None:
        """Count the state after update number `step`, moving 1/share of the way to it; default: the plain mean."""
        self.first, self.last = self.first or step, step
        self.n += 1
        for name in float_names(state):
            self._pull_(name, state[name].detach(), share or self.n)

    @torch.no_grad()
    def merge_(self, other: Average) -> None:
        """Count everything that `other` counted, later updates than these."""
        if not other.n:
            return
        self.first, self.last = self.first or other.first, other.last
        self.n += other.n
        for name, value in other.mean.items():
            self._pull_(name, value, self.n / other.n)

    def _pull_(self, name: str, value: Tensor, share: float) -> None:
        """Move the mean of one entry towards `value` by 1/share of the way."""
        if name not in self.mean:
            self.mean[name] = value.to(torch.float32, copy=True)
            return
        mean = self.mean[name] = self.mean[name].to(value.device)  # one from a checkpoint lies on the CPU
        mean += (value.float() - mean).div_(share)

    def tensors(self, prefix: str) -> State:
        """Return the mean under names that begin with `prefix`, for a checkpoint."""
        return {f"{prefix}{name}": value for name, value in self.mean.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the rest of what a checkpoint needs."""
        return {"n": self.n, "first": self.first, "last": self.last}

    @classmethod
    def restored(cls, prefix: str, tensors: State, saved: Mapping[str, Any]) -> Average:
        """Return the average that `tensors` and `to_json` described (KeyError if `saved` lacks something)."""
        average = cls()
        average.mean = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        average.n, average.first, average.last = saved["n"], saved["first"], saved["last"]
        return average

    def __str__(self) -> str:
        """Return what was averaged, in words."""
        return f"average of updates {self.first} to {self.last}"
