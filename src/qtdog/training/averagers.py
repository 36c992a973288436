"""Averagers: which weights are kept (none, SWA, SMA, BMA); SWAD has a file of its own."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qtdog.core.registry import HyperParameter, HyperParameters, Registry, Value, fill

State = dict[str, Tensor]


class Averager(ABC):
    """Watches the weights and says which ones are evaluated and kept; abstract.

    Everything is over the network's state dict: latent weights, step sizes and buffers. The average is of the floating
    point entries; others (INQ's masks, batch counters) are not in it, so that they stay those of the last update. Step
    sizes learned on a log scale are averaged as they are: it is their geometric mean. Only weights that could ship
    count (`Components.selectable`): none before the start step, with INQ none before the last stage.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        READS_HELDOUT: whether it follows the loss on the held-out source images.
        params: their values.
        start: the first number of updates after which weights may count: 0, or the start step of a quantized run, since
            step sizes mean nothing before it.
        begin: number of the first update that counts.
        n_steps: updates of the whole run, told where its parts are put together.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    READS_HELDOUT: ClassVar[bool] = False

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        self.params = fill(f"averager '{AVERAGERS.name_of(type(self))}'", self.HYPERPARAMETERS, params)
        self.start = start
        self.begin = start + 1
        self.n_steps = 0

    @abstractmethod
    def after_step(self, step: int, network: nn.Module) -> None:
        """Take note of the weights after update number `step` (1 is the first), which could ship."""

    def after_evaluation(self, step: int, source_loss: float) -> None:  # noqa: B027  (most members do nothing)
        """Take note of the mean loss on the held-out source images at `step`."""

    @abstractmethod
    def evaluated(self) -> State | None:
        """Return what an evaluation during training should measure; None for the weights as they are."""

    def final(self) -> State | None:
        """Return what ships at the end whatever selection says; None to ship the selected checkpoint."""
        return None

    def kept(self, step: int) -> str:
        """Return in words what ships, if selection chose the evaluation after update `step`."""
        return f"weights after update {step}"

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the averager's own state for a checkpoint: tensors, and what JSON can hold."""
        return {}, {}

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:  # noqa: B027  (a member without state)
        """Put back what `state` returned."""


AVERAGERS: Registry[type[Averager]] = Registry("averager")


@AVERAGERS.register("none")
class NoAverage(Averager):
    """The weights as they are."""

    def after_step(self, step: int, network: nn.Module) -> None:
        """No average is kept."""

    def evaluated(self) -> State | None:
        """The weights as they are."""
        return None


def snapshot(network: nn.Module) -> State:
    """Return a copy of the network's state on the CPU, latent weights and step sizes included."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


@contextlib.contextmanager
def swapped(network: nn.Module, state: State | None) -> Iterator[None]:
    """Let the network have other weights inside the block, and its own again after it; None changes nothing.

    Entries that `state` lacks stay as they are.
    """
    if state is None:
        yield
        return
    own = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state, strict=False)
    try:
        yield
    finally:
        network.load_state_dict(own)
        del own


def float_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the entries that can be averaged.

    Example:
        >>> import torch
        >>> float_names({"w": torch.zeros(1), "n": torch.zeros(1, dtype=torch.int64)})
        ['w']
    """
    return [name for name, value in state.items() if value.is_floating_point()]


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
        """The weights as they are."""
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
        """The weights as they are."""
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
