"""Loss surfaces: where a network is moved on a line or a plane, as pure functions of coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtdog.analysis.directions import Displaced, filter_direction
from qtdog.core.errors import ModelError

State = Mapping[str, Tensor]


def between(start: nn.Module, end: nn.Module) -> list[Tensor]:
    """Return the direction from one network's parameters to another's: w_end - w_start, for `Displaced.to_`.

    Raises:
        ModelError: their parameters have other names or shapes, so that no line leads from one to the other.

    Example:
        >>> one, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = one.weight.data.fill_(1.0), other.weight.data.fill_(4.0)
        >>> between(one, other)[0].item()
        3.0
    """
    here, there = dict(start.named_parameters()), dict(end.named_parameters())
    if {name: value.shape for name, value in here.items()} != {name: value.shape for name, value in there.items()}:
        raise ModelError("no line leads between networks of different parameters: take runs of one backbone")
    return [(there[name] - here[name]).detach() for name in here]


def across(along: Sequence[Tensor], parameters: Sequence[Tensor], seed: int, n: int) -> list[Tensor]:
    """Return a random direction at right angles to `along`, and as long.

    It is a filter-normalised one (`directions.filter_direction`) without its part along the line.

    Args:
        along: the first direction of a plane, not zero.
        parameters: the weights at its origin.
        seed: of the random numbers.
        n: number of the direction.

    Example:
        >>> out = across([torch.tensor([[3.0, 4.0]])], [torch.tensor([[1.0, 1.0]])], 0, 0)
        >>> round(out[0].norm().item(), 4), abs(round((out[0] * torch.tensor([[3.0, 4.0]])).sum().item(), 4))
        (5.0, 0.0)
    """
    drawn = filter_direction(parameters, seed, n)
    share = _dot(drawn, along) / _dot(along, along)
    rest = [part - share * base for part, base in zip(drawn, along, strict=True)]
    stretch = (_dot(along, along) / _dot(rest, rest)) ** 0.5
    return [part * stretch for part in rest]


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(one, other, strict=True))


class Plane:
    """A network that moves in a plane (or on a line) of its parameters and is put back at the end of the context.

    Moving statistics of batch norm fit the weights that they were gathered with. Where the weights move they are
    measured anew (`refit`), unless every network at hand has the same ones, as with frozen batch norm.

    Args:
        network: plain; moved in place.
        axes: one or two directions.
        refit: called after each move; None to leave the statistics alone.

    Raises:
        ModelError: the network carries quantizers.
    """

    def __init__(
        self, network: nn.Module, axes: Sequence[Sequence[Tensor]], refit: Callable[[], None] | None = None
    ) -> None:
        self._moved = Displaced(network)
        self._axes, self._refit = axes, refit
        self._network = network
        self._buffers = {name: value.clone() for name, value in network.named_buffers()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Put weights and statistics back."""
        self._moved.to_()
        with torch.no_grad():
            for name, value in self._network.named_buffers():
                value.copy_(self._buffers[name])

    def to_(self, *place: float) -> None:
        """Move to origin + Σ place_i · axis_i."""
        self._moved.to_(*zip(place, self._axes, strict=True))
        if self._refit is not None:
            self._refit()


def same_statistics(networks: Sequence[nn.Module]) -> bool:
    """Return whether all networks have the same moving statistics of batch norm, bit for bit (or none).

    Example:
        >>> same_statistics([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
        True
    """
    first, *others = ([*_statistics(network)] for network in networks)
    return all(
        len(first) == len(other) and all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        for other in others
    )


def _statistics(network: nn.Module) -> list[Tensor]:
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    pairs = [(layer.running_mean, layer.running_var) for layer in layers]
    return [buffer for pair in pairs for buffer in pair if buffer is not None]
