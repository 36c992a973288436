"""Local flatness: how much the loss rises when the weights move a given distance in a random direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import sites
from qtdog.core.errors import ModelError
from qtdog.core.random import torch_stream
from qtdog.data.dataset import Progress


@dataclass(frozen=True)
class Flatness:
    """F_γ at one radius.

    Attributes:
        gamma: the radius γ, in the units of the weights.
        increase: mean of E(w') - E(w) over the directions; small is flat.
        standard_error: of that mean, from the spread over the directions.
        n_directions: how many.
    """

    gamma: float
    increase: float
    standard_error: float
    n_directions: int


def local_flatness(
    network: nn.Module,
    loss: Callable[[], float],
    gammas: Sequence[float],
    *,
    n_directions: int = 100,
    seed: int = 0,
    progress: Progress = None,
) -> list[Flatness]:
    """Return F_γ = E over ‖w' - w‖ = γ of [E(w') - E(w)] for each radius γ, by Monte Carlo.

    A direction is one Gaussian vector over all parameters joined, brought to unit length; every radius uses the same
    directions. The network must be plain: latent weights under a quantizer would look flat for free, since nothing
    moves inside a bin. Load a shipped file, or bake the weights (`conversion.bake`) into a freshly built network.

    Source: Javed et al., QT-DoG, ICML 2025, Eq. 5; procedure of Cha et al., SWAD, NeurIPS 2021, Eq. 2.

    Args:
        network: moved in place, and put back exactly.
        loss: E of the network as it then is, such as its mean cross-entropy in evaluation mode.
        gammas: radii.
        n_directions: random directions, 2 or more.
        seed: of the directions.
        progress: is told of each direction.

    Raises:
        ModelError: the network carries quantizers.
        ValueError: fewer than two directions, of which no spread could be known.

    Example:
        >>> bowl = nn.Linear(2, 1, bias=False)  # E = ½ ‖w - w₀‖², so that F_γ = γ² / 2 in every direction from w₀
        >>> start = bowl.weight.detach().clone()
        >>> found = local_flatness(bowl, lambda: (bowl.weight - start).square().sum().item() / 2, [2.0], n_directions=5)
        >>> round(found[0].increase, 4)
        2.0
    """
    if next(sites(network), None) is not None:
        raise ModelError("flatness is measured on plain weights: load the shipped file, or bake them into a network")
    if n_directions < 2:
        raise ValueError(f"n_directions must be at least 2, not {n_directions}")
    parameters = list(network.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    base = loss()
    increases = torch.zeros(n_directions, len(gammas), dtype=torch.float64)
    try:
        for n in range(n_directions):
            direction = random_direction(parameters, seed, n)
            for g, gamma in enumerate(gammas):
                _place_(parameters, start, direction, gamma)
                increases[n, g] = loss() - base
            if progress is not None:
                progress(n + 1, n_directions)
    finally:
        _place_(parameters, start, start, 0.0)
    errors = increases.std(0) / math.sqrt(n_directions)
    return [
        Flatness(gamma, mean, error, n_directions)
        for gamma, mean, error in zip(gammas, increases.mean(0).tolist(), errors.tolist(), strict=True)
    ]


def random_direction(parameters: Sequence[Tensor], seed: int, n: int) -> list[Tensor]:
    """Return direction number `n`: Gaussian over all parameters joined, of unit length, in their shapes and devices.

    Drawn on the CPU, so that every device and every process sees the same.

    Example:
        >>> parts = random_direction([torch.zeros(3, 2), torch.zeros(4)], 0, 0)
        >>> round(sum(part.square().sum().item() for part in parts), 5)
        1.0
    """
    generator = torch_stream(seed, "direction", n)
    drawn = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    length = math.sqrt(sum(part.double().square().sum().item() for part in drawn))
    return [part.to(parameter) / length for part, parameter in zip(drawn, parameters, strict=True)]


def weight_norm(network: nn.Module) -> float:
    """Return the length ‖w‖ of all parameters joined: the scale on which a radius is large or small.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> weight_norm(layer)
        5.0
    """
    return math.sqrt(sum(_squares(network)))


def _squares(network: nn.Module) -> Iterator[float]:
    return (parameter.detach().double().square().sum().item() for parameter in network.parameters())


@torch.no_grad()
def _place_(parameters: Sequence[Tensor], start: Sequence[Tensor], direction: Sequence[Tensor], gamma: float) -> None:
    for parameter, origin, step in zip(parameters, start, direction, strict=True):
        parameter.copy_(origin)
        if gamma:
            parameter.add_(step, alpha=gamma)
