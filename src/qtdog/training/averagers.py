"""Averagers: which weights are kept."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from qtdog.core.registry import HyperParameters, Registry, Value, fill

State = dict[str, Tensor]


class Averager(ABC):
    """Watches the weights and says which ones are evaluated and kept; abstract.

    Everything is over the network's state dict: latent weights, step sizes and buffers. The average is of the floating
    point entries; others (INQ's masks, batch counters) are not in it, so that they stay those of the last update. Step
    sizes learned on a log scale are averaged as they are: it is their geometric mean. Only weights that could ship
    count (`Parts.selectable`): none before the start step, with INQ none before the last stage.

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
        self.params = fill(f"averager '{type(self).__name__}'", self.HYPERPARAMETERS, params)
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
        """Do nothing."""

    def evaluated(self) -> State | None:
        """Return None: the weights as they are."""
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
