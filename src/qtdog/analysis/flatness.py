"""Local flatness: how much the loss rises when the weights move a given distance in a random direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtdog.analysis.directions import Displaced, Radius
from qtdog.core.progress import Progress


@dataclass(frozen=True)
class Flatness:
    """F_γ at one radius.

    Attributes:
        gamma: the radius γ, in the units of the weights, or as a share of each filter's length.
        increase: mean of E(w') - E(w) over the directions; small is flat.
        standard_error: of that mean, from the spread over the independent directions.
        n_directions: how many, opposite ones counted too.
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
    antithetic: bool = False,
    radius: Radius = "absolute",
    progress: Progress = None,
) -> list[Flatness]:
    """Return F_γ = E over ‖w' - w‖ = γ of [E(w') - E(w)] for each radius γ, by Monte Carlo.

    A direction is one Gaussian vector over all parameters joined, brought to unit length; every radius uses the same
    directions. The network must be plain (`analysis.directions.Displaced`).

    Source: Javed et al., QT-DoG, ICML 2025, Eq. 5; procedure of Cha et al., SWAD, NeurIPS 2021, Eq. 2; the
    filter-normalised radius of Li et al., NeurIPS 2018, section 4.

    Args:
        network: moved in place, and put back exactly.
        loss: E of the network as it then is, such as its mean cross-entropy in evaluation mode.
        gammas: radii.
        n_directions: random directions, 2 or more.
        seed: of the directions.
        antithetic: take every direction and its opposite, so that the slope of the loss cancels and only its curvature
            counts; `n_directions` counts both, and must be even and 4 or more.
        radius: `absolute`, or `filter`: γ is then a share of each filter's length.
        progress: is told of each direction.

    Raises:
        ModelError: the network carries quantizers.
        ValueError: too few directions to know their spread, or an odd number of them in pairs.

    Example:
        >>> bowl = nn.Linear(2, 1, bias=False)  # E = ½ ‖w - w₀‖², so that F_γ = γ² / 2 in every direction from w₀
        >>> start = bowl.weight.detach().clone()
        >>> found = local_flatness(bowl, lambda: (bowl.weight - start).square().sum().item() / 2, [2.0], n_directions=5)
        >>> round(found[0].increase, 4)
        2.0
    """
    check_directions(n_directions, antithetic=antithetic)
    with Displaced(network) as moved:
        base = loss()
        increases = torch.zeros(n_directions, len(gammas), dtype=torch.float64)
        for n in range(n_directions):
            number, sign = numbered(n, antithetic=antithetic)
            direction = moved.direction(seed, number, radius)
            for g, gamma in enumerate(gammas):
                moved.to_((sign * gamma, direction))
                increases[n, g] = loss() - base
            if progress is not None:
                progress(n + 1, n_directions)
    return summarise(gammas, increases, antithetic=antithetic)


def check_directions(n_directions: int, *, antithetic: bool) -> None:
    """Refuse numbers of directions whose spread could not be known.

    Raises:
        ValueError: fewer than two, or in pairs fewer than two pairs or an odd number.

    Example:
        >>> check_directions(4, antithetic=True)
    """
    if antithetic and (n_directions < 4 or n_directions % 2):
        raise ValueError(f"n_directions counts both of each pair and must be even and at least 4, not {n_directions}")
    if n_directions < 2:
        raise ValueError(f"n_directions must be at least 2, not {n_directions}")


def numbered(n: int, *, antithetic: bool) -> tuple[int, int]:
    """Return number and sign of the direction that comes as the n-th: 0, -0, 1, -1 and so on in pairs.

    Example:
        >>> [numbered(n, antithetic=True) for n in range(3)], numbered(2, antithetic=False)
        ([(0, 1), (0, -1), (1, 1)], (2, 1))
    """
    return (n // 2, 1 - 2 * (n % 2)) if antithetic else (n, 1)


def summarise(gammas: Sequence[float], increases: Tensor, *, antithetic: bool) -> list[Flatness]:
    """Return mean and standard error of each radius from the rises of the loss.

    With opposite directions the error is that of the means of the pairs, which are what is independent.

    Args:
        gammas: radii.
        increases: float64 (directions, radii).
        antithetic: whether each two rows belong to opposite directions.

    Example:
        >>> summarise([1.0], torch.tensor([[3.0], [-1.0], [2.0], [2.0]]), antithetic=True)[0].standard_error
        0.5
    """
    means = increases.reshape(-1, 2, len(gammas)).mean(1) if antithetic else increases
    errors = means.std(0) / math.sqrt(len(means))
    return [
        Flatness(gamma, mean, error, len(increases))
        for gamma, mean, error in zip(gammas, means.mean(0).tolist(), errors.tolist(), strict=True)
    ]


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
