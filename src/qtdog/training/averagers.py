"""Averagers: which weights are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from qtdog.core.registry import Registry


class Averager(Protocol):
    """Watches the weights and says which ones an evaluation keeps."""

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the state to keep, as CPU copies."""
        ...


AVERAGERS: Registry[Callable[[], Averager]] = Registry("averager")


class NoAverage:
    """Keeps the weights as they are."""

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return a copy of the network's state, latent weights and step sizes included."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


@AVERAGERS.register("none")
def _none() -> Averager:
    return NoAverage()
