"""Directions in the space of all parameters joined, and moving a network along them and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import sites
from qtdog.core.errors import ModelError
from qtdog.core.random import torch_stream

Radius = Literal["absolute", "filter"]
Direction = Sequence[Tensor]


def random_direction(parameters: Sequence[Tensor], seed: int, n: int) -> list[Tensor]:
    """Return direction number `n`: Gaussian over all parameters joined, of unit length, in their shapes and devices.

    Drawn on the CPU, so that every device and every process sees the same.

    Example:
        >>> parts = random_direction([torch.zeros(3, 2), torch.zeros(4)], 0, 0)
        >>> round(sum(part.square().sum().item() for part in parts), 5)
        1.0
    """
    drawn = _gaussian(parameters, seed, n)
    length = math.sqrt(sum(part.double().square().sum().item() for part in drawn))
    return [part.to(parameter) / length for part, parameter in zip(drawn, parameters, strict=True)]


def filter_direction(parameters: Sequence[Tensor], seed: int, n: int) -> list[Tensor]:
    """Return direction number `n` with every filter as long as the filter of the weights: d_i ← d_i / ‖d_i‖ · ‖w_i‖.

    A step α along it changes every filter by the share α of its length, so that networks of large and of small weights
    can be compared. Biases and the parameters of normalisation layers do not move.

    Source: Li et al., NeurIPS 2018, section 4 and its note on batch norm.

    Args:
        parameters: the weights; a filter is an index of the first dimension, of two dimensions or more.
        seed: of the Gaussian numbers, the same as in `random_direction`.
        n: number of the direction.

    Example:
        >>> (part,) = filter_direction([torch.tensor([[3.0, 4.0], [0.0, 0.5]])], 0, 0)
        >>> [round(row.norm().item(), 5) for row in part]
        [5.0, 0.5]
    """
    drawn = _gaussian(parameters, seed, n)
    return [_like_filters(part.to(weight), weight) for part, weight in zip(drawn, parameters, strict=True)]


def _like_filters(part: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    rows, own = part.flatten(1), weight.detach().flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True) * own.norm(dim=1, keepdim=True)
    return rows.reshape(weight.shape)


def _gaussian(parameters: Sequence[Tensor], seed: int, n: int) -> list[Tensor]:
    generator = torch_stream(seed, "direction", n)
    return [torch.randn(parameter.shape, generator=generator) for parameter in parameters]


class Displaced:
    """A network that can be moved away from its weights, and is put back at the end of the context, exactly.

    The network must be plain: latent weights under a quantizer would look flat for free, since nothing moves inside a
    bin, and moving step sizes would break it. Load a saved file, or bake the weights (`conversion.save`) into a
    freshly built network.

    Args:
        network: moved in place; all its parameters take part, whatever the method.

    Raises:
        ModelError: the network carries quantizers.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = layer.weight.data.fill_(1.0)
        >>> with Displaced(layer) as moved:
        ...     moved.to_((2.0, [torch.ones(1, 1)]))
        ...     print(layer.weight.item())
        3.0
        >>> layer.weight.item()
        1.0
    """

    def __init__(self, network: nn.Module) -> None:
        if sites(network):
            raise ModelError("only plain weights are moved: load the saved file, or bake them into a network")
        self.parameters = list(network.parameters())
        self._start: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Put the weights back."""
        self.to_()

    @torch.no_grad()
    def to_(self, *steps: tuple[float, Direction]) -> None:
        """Move to w + Σ a · d over the pairs (a, d) of `steps`; without any, back to w."""
        for parameter, origin in zip(self.parameters, self._start, strict=True):
            parameter.copy_(origin)
        for length, direction in steps:
            if length:
                for parameter, part in zip(self.parameters, direction, strict=True):
                    parameter.add_(part, alpha=length)

    def direction(self, seed: int, n: int, radius: str) -> list[Tensor]:
        """Return direction number `n`, of unit length (radius `absolute`) or as long as the filters (`filter`)."""
        make = {"absolute": random_direction, "filter": filter_direction}[radius]
        return make(self._start, seed, n)
