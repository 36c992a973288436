"""Local flatness of finished runs: how much the loss rises when the weights move a distance in random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from qtdog.analysis.analyzed_run import AnalyzedRun, all_images, losses_by_domain, role_mean, shift
from qtdog.analysis.measurements import (
    AnalysisResult,
    Measurements,
    curve_style,
    escape_dollar,
    legend,
    panels,
    save_figure,
    write_result,
)
from qtdog.conversion.attach import sites
from qtdog.core.errors import ConfigError, ModelError
from qtdog.core.progress import Progress
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
    can be compared. Biases and the parameters of normalization layers do not move.

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
    directions. The network must be plain (`analysis.flatness.Displaced`).

    Source: Javed et al., QT-DoG, ICML 2025, Eq. 5; procedure of Cha et al., SWAD, NeurIPS 2021, Eq. 2; the
    filter-normalized radius of Li et al., NeurIPS 2018, section 4.

    Args:
        network: moved in place, and put back exactly.
        loss: E of the network as it then is, such as its mean cross-entropy in evaluation mode.
        gammas: radii.
        n_directions: random directions, 2 or more.
        seed: of the directions.
        antithetic: take every direction and its opposite, so that the slope of the loss cancels and only its curvature
            counts; `n_directions` counts both, and must be even and 4 or more.
        radius: `absolute`, or `filter`: γ is then a share of each filter's length.
        progress: reports each direction.

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
        move_ = _mover(moved, seed, antithetic=antithetic)
        for n in range(n_directions):
            for g, gamma in enumerate(gammas):
                move_(radius, n, gamma)
                increases[n, g] = loss() - base
            if progress is not None:
                progress(n + 1, n_directions)
    return summarize_rises(gammas, increases, antithetic=antithetic)


def _mover(moved: Displaced, seed: int, *, antithetic: bool) -> Callable[[Radius, int, float], None]:
    """Return a function that moves the network by a radius along the direction that comes as the n-th."""
    direction = lru_cache(maxsize=1)(moved.direction)  # the radii and the opposite of one follow each other

    def move_(radius: Radius, n: int, gamma: float) -> None:
        number, sign = numbered(n, antithetic=antithetic)
        moved.to_((sign * gamma, direction(seed, number, radius)))

    return move_


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


def summarize_rises(gammas: Sequence[float], increases: Tensor, *, antithetic: bool) -> list[Flatness]:
    """Return mean and standard error of each radius from the rises of the loss.

    With opposite directions the error is that of the means of the pairs, which are what is independent.

    Args:
        gammas: radii.
        increases: float64 (directions, radii).
        antithetic: whether each two rows belong to opposite directions.

    Example:
        >>> summarize_rises([1.0], torch.tensor([[3.0], [-1.0], [2.0], [2.0]]), antithetic=True)[0].standard_error
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


RADII: dict[str, tuple[float, ...]] = {
    "absolute": tuple(5.0 * k for k in range(13)),  # 0, 5 … 60, as the paper
    "filter": tuple(k / 40 for k in range(5)),  # up to 10 % of each filter
}
XLABELS = {"absolute": "radius γ (units of the weights)", "filter": "radius γ (share of each filter's length)"}
KEY = ("run", "radius", "direction", "gamma")
BASE = ("none", "base", 0.0)
Place = tuple[str, int | str, float]


@dataclass(frozen=True)
class FlatnessPlan:
    """What is measured of each run.

    Attributes:
        gammas: radii by kind (`absolute`, `filter`).
        n_directions: random directions in opposite pairs, both counted.
        n_images: of each domain.
        seed: of images and directions.

    Raises:
        ConfigError: numbers that make no sense.
    """

    gammas: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: RADII)
    n_directions: int = 100
    n_images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        try:
            check_directions(self.n_directions, antithetic=True)
        except ValueError as error:
            raise ConfigError(f"--num-directions: {error}") from error
        given = [gamma for gammas in self.gammas.values() for gamma in gammas]
        if not given or min(given) < 0:
            raise ConfigError("radii are numbers of 0 or more, and one at least: see --radii and --filter-radii")

    @property
    def places(self) -> list[Place]:
        """Where the loss is measured: where the run stands, then by kind, direction and radius above 0."""
        moved = [
            (kind, n, gamma)
            for kind, gammas in self.gammas.items()
            for n in range(self.n_directions)
            for gamma in gammas
            if gamma > 0
        ]
        return [BASE, *moved]


def measure_flatness(
    runs: Sequence[AnalyzedRun],
    plan: FlatnessPlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure F_γ of every run on its sources (held-out images) and its target; return what `analysis.json` says.

    The weights are those that are saved, dequantized; all parameters move, of every run the same ones. The loss of each
    place is kept in `points.csv`, and is not measured again. One place costs one pass over the images.

    Args:
        runs: the runs, of one data set.
        plan: what is measured.
        folder: where points, table and figures go.
        progress: reports passes over the images.
        check: called before each batch; may raise to break off.

    Raises:
        RunError: the folder holds points of other settings, or cannot be written.
        ConfigError, DataError: as in `analysis.analyzed_run.domain_images`.
    """
    settings = {"n_images": plan.n_images, "seed": plan.seed}
    points = Measurements(folder, KEY, runs[0].dataset.domains, settings)
    n_places = len(plan.places)
    for s, run in enumerate(runs):
        shifted = shift(progress, s * n_places, len(runs) * n_places)
        _measure(run, plan, points, progress=shifted, check=check)
    numbers = [row for run in runs for row in flatness_numbers(run, plan, points)]
    figures = [name for kind in plan.gammas for name in draw_flatness(numbers, kind, folder)]
    return write_result(folder, _result(runs, plan, settings, numbers, figures))


def _measure(
    run: AnalyzedRun, plan: FlatnessPlan, points: Measurements, *, progress: Progress, check: Callable[[], None]
) -> None:
    places = plan.places
    missing = [(i, place) for i, place in enumerate(places) if (run.id, *place) not in points]
    if not missing:
        return
    images = all_images(run, plan.n_images, plan.seed)
    with Displaced(run.model.network) as moved:
        move_ = _mover(moved, plan.seed, antithetic=True)
        for i, (kind, n, gamma) in missing:
            if (kind, n, gamma) == BASE:
                moved.to_()
            else:
                move_(cast(Radius, kind), int(n), gamma)
            _add(points, run, (kind, n, gamma), losses_by_domain(run.model, images, check=check))
            if progress is not None:
                progress(i + 1, len(places))


def _add(points: Measurements, run: AnalyzedRun, key: tuple[Any, ...], losses: Mapping[str, float]) -> None:
    points.add_((run.id, *key), [losses.get(domain) for domain in run.dataset.domains])


def flatness_numbers(run: AnalyzedRun, plan: FlatnessPlan, points: Measurements) -> list[dict[str, Any]]:
    """Return the rows of the table of one run: F_γ on sources and target at every radius of every kind."""
    rows = {(row["radius"], row["direction"], float(row["gamma"])): row for row in points.of(run=run.id)}
    norm = weight_norm(run.model.network)
    numbers = []
    for role, domains in run.roles.items():
        base = role_mean(rows[BASE], domains)
        for kind, gammas in plan.gammas.items():
            rises = [
                [role_mean(rows[kind, str(n), gamma], domains) - base if gamma else 0.0 for gamma in gammas]
                for n in range(plan.n_directions)
            ]
            found = summarize_rises(gammas, torch.tensor(rises, dtype=torch.float64), antithetic=True)
            who = {"run": run.label, "on": role, "radius": kind, "loss": base, "weight_norm": norm}
            numbers += [who | asdict(flat) for flat in found]
    return numbers


def draw_flatness(numbers: Sequence[Mapping[str, Any]], kind: str, folder: Path) -> list[str]:
    """Draw F_γ over γ, a panel for sources and one for the target, bands of one standard error; return the files."""
    shown = [row for row in numbers if row["radius"] == kind]
    roles = list(dict.fromkeys(row["on"] for row in shown))
    labels = list(dict.fromkeys(row["run"] for row in shown))
    figure, axes = panels(len(roles))
    for axis, role in zip(axes, roles, strict=True):
        for n, label in enumerate(labels):
            _curve(
                axis,
                [row for row in shown if (row["on"], row["run"]) == (role, label)],
                escape_dollar(label),
                curve_style(n),
            )
        axis.set_title("sources (held-out images)" if role == "sources" else "target (unseen domain)")
        axis.set_xlabel(XLABELS[kind])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rise of the loss F (nats)")
    legend(figure, axes[0])
    return save_figure(figure, folder, "flatness" if kind == "absolute" else "flatness-filter")


def _curve(axis: Any, rows: Sequence[Mapping[str, Any]], label: str, look: Mapping[str, Any]) -> None:
    gammas, means = [row["gamma"] for row in rows], [row["increase"] for row in rows]
    errors = [row["standard_error"] for row in rows]
    axis.plot(gammas, means, label=label, markersize=4, **look)
    low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
    axis.fill_between(gammas, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _result(
    runs: Sequence[AnalyzedRun],
    plan: FlatnessPlan,
    settings: Mapping[str, Any],
    numbers: Sequence[Mapping[str, Any]],
    figures: Sequence[str],
) -> AnalysisResult:
    return AnalysisResult(
        kind="flatness",
        title="Local flatness: rise of the loss at distance γ from the weights",
        settings={**settings, "n_directions": plan.n_directions, "gammas": dict(plan.gammas)},
        runs=[run.to_json() for run in runs],
        numbers=numbers,
        figures=figures,
        notes=(
            "Dequantized weights; every parameter moves; opposite directions; bands are one standard error over pairs.",
            "An absolute radius favors networks of large weights: compare weight_norm, and the filter radius.",
        ),
    )
