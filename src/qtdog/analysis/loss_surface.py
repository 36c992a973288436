"""Loss surfaces of finished runs: around one, or along the line between two, on sources and target."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qtdog.analysis.analyzed_run import AnalyzedRun, all_images, batches, losses_by_domain, role_mean, training_images
from qtdog.analysis.flatness import Displaced, filter_direction
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
from qtdog.core.errors import ConfigError, ModelError
from qtdog.core.progress import Progress
from qtdog.training.evaluation import estimate_statistics_

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

    It is a filter-normalized one (`directions.filter_direction`) without its part along the line.

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


N_LEVELS = 15
ROLES = {"sources": "sources (held-out images)", "target": "target (unseen domain)"}
FILTER_SHARE = "share of filter length"


def draw_surface(numbers: Sequence[Mapping[str, Any]], labels: Sequence[str], folder: Path) -> list[str]:
    """Draw the loss of sources and target over one coordinate or two; return the names of the files.

    Args:
        numbers: rows with `x`, `y` and a loss for each role.
        labels: of the one run at the origin, or of the two at x = 0 and 1.
        folder: where to.
    """
    roles = [role for role in ROLES if role in numbers[0]]
    if len({row["y"] for row in numbers}) == 1:
        figure, axes = panels(1, width=5.6)
        _line(axes[0], numbers, roles, labels)
        legend(figure, axes[0])
    else:
        figure, axes = panels(len(roles))
        for axis, role in zip(axes, roles, strict=True):
            _plane(figure, axis, numbers, role, labels)
        legend(figure, axes[0])
    return save_figure(figure, folder, "surface")


def _line(axis: Axes, numbers: Sequence[Mapping[str, Any]], roles: Sequence[str], labels: Sequence[str]) -> None:
    for n, role in enumerate(roles):
        axis.plot([row["x"] for row in numbers], [row[role] for row in numbers], label=ROLES[role], **curve_style(n))
    for place, label in enumerate(labels):
        axis.axvline(place, color="#666666", linestyle=":" if place == 0 else "--", label=escape_dollar(label))
    axis.set_xlabel(_xlabel(labels))
    axis.set_ylabel("cross-entropy (nats)")
    axis.grid(alpha=0.3)


def _xlabel(labels: Sequence[str]) -> str:
    return f"random direction ({FILTER_SHARE})" if len(labels) == 1 else "from the first run (0) to the second (1)"


def _plane(figure: Figure, axis: Axes, numbers: Sequence[Mapping[str, Any]], role: str, labels: Sequence[str]) -> None:
    xs, ys = (sorted({row[name] for row in numbers}) for name in ("x", "y"))
    found = {(row["x"], row["y"]): row[role] for row in numbers}
    heights = np.array([[found.get((x, y), np.nan) for x in xs] for y in ys])
    drawn = axis.contourf(xs, ys, np.ma.masked_invalid(heights), levels=N_LEVELS, cmap="viridis")
    figure.colorbar(drawn, ax=axis, label="cross-entropy (nats)")
    for place, label in enumerate(labels):
        axis.plot(
            [place],
            [0],
            linestyle="none",
            markeredgecolor="white",
            label=escape_dollar(label),
            **curve_style(place + 1),
        )
    axis.set_title(ROLES[role])
    axis.set_xlabel(_xlabel(labels))
    share = "distance of the two runs" if len(labels) == 2 else FILTER_SHARE
    axis.set_ylabel(f"random direction ({share})")


N_REFIT = 256  # training images of each source that moving statistics are measured on


@dataclass(frozen=True)
class SurfacePlan:
    """Where the loss is measured.

    Attributes:
        n_dims: 1 for a line, 2 for a plane.
        n_points: on each axis; those of the runs themselves are added.
        reach: around one run, how far each axis goes to both sides, as a share of each filter's length; between two,
            how far the line goes beyond each of them, as a share of their distance.
        n_images: of each domain.
        seed: of images and directions.

    Raises:
        ConfigError: numbers that make no sense.
    """

    n_dims: int = 1
    n_points: int = 21
    reach: float = 0.25
    n_images: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.n_points < 3 or self.reach < 0:
            raise ConfigError("--num-points must be at least 3, and --reach not negative")

    def ticks(self, *, line: bool) -> list[float]:
        """Return the coordinates on an axis, evenly spread, and the runs' own: 0 and 1 of a line between two, else 0.

        Example:
            >>> SurfacePlan(n_points=3, reach=0.5).ticks(line=True), SurfacePlan(n_points=3).ticks(line=False)
            ([-0.5, 0.0, 0.5, 1.0, 1.5], [-0.25, 0.0, 0.25])
        """
        ends = (-self.reach, 1 + self.reach) if line else (-self.reach, self.reach)
        spread = {round(float(x), 9) for x in np.linspace(*ends, self.n_points)}
        return sorted(spread | {0.0, 1.0} if line else spread | {0.0})


def measure_surface(
    runs: Sequence[AnalyzedRun],
    plan: SurfacePlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the loss around one run, or on the line from the first of two runs to the second; return `analysis.json`.

    Around a run the axes are random filter-normalized directions; the second axis of a plane through two runs is one at
    right angles to the line, and as long. Moving statistics of batch norm are measured anew at each point on training
    images of the sources, unless all runs have the same ones.

    Args:
        runs: one run, or two of one backbone on one data set.
        plan: where.
        folder: where points, table and figures go.
        progress: reports points; each costs a pass over the images.
        check: called before each batch; may raise to break off.

    Raises:
        ConfigError: more than two runs.
        ModelError: the two runs have different networks.
        RunError: the folder holds points of other settings or runs, or cannot be written.
    """
    if not 1 <= len(runs) <= 2:
        raise ConfigError(f"a surface is drawn around one run or between two, not {len(runs)}")
    first, line = runs[0], len(runs) == 2
    settings = asdict(plan) | {"runs": [run.id for run in runs]}
    points = Measurements(folder, ("x", "y"), first.dataset.domains, settings)
    own = plan.ticks(line=False)
    places = list(itertools.product(plan.ticks(line=line), own if plan.n_dims == 2 else [0.0]))
    if any(place not in points for place in places):
        _measure(runs, plan, places, points, progress=progress, check=check)
    numbers = _numbers(first, points)
    result = AnalysisResult(
        kind="surface",
        title=f"Loss from {first.label} to {runs[1].label}" if line else f"Loss around {first.label}",
        settings=settings,
        runs=[run.to_json() for run in runs],
        numbers=numbers,
        figures=draw_surface(numbers, [run.label for run in runs], folder),
        notes=("Dequantized weights; the line is straight in all parameters.",),
    )
    return write_result(folder, result)


def _measure(
    runs: Sequence[AnalyzedRun],
    plan: SurfacePlan,
    places: Sequence[tuple[float, float]],
    points: Measurements,
    *,
    progress: Progress,
    check: Callable[[], None],
) -> None:
    first = runs[0]
    images = all_images(first, plan.n_images, plan.seed)
    with Plane(first.model.network, _axes(runs, plan), _refit(runs, plan, check)) as plane:
        for done, place in enumerate(places):
            if place not in points:
                plane.to_(*place[: plan.n_dims])
                losses = losses_by_domain(first.model, images, check=check)
                points.add_(place, [losses.get(domain) for domain in first.dataset.domains])
            if progress is not None:
                progress(done + 1, len(places))


def _axes(runs: Sequence[AnalyzedRun], plan: SurfacePlan) -> list[list[Tensor]]:
    networks = [run.model.network for run in runs]
    weights = [parameter.detach().clone() for parameter in networks[0].parameters()]
    if len(networks) == 1:
        return [filter_direction(weights, plan.seed, n) for n in range(plan.n_dims)]
    along = between(*networks)
    return [along] if plan.n_dims == 1 else [along, across(along, weights, plan.seed, 0)]


def _refit(runs: Sequence[AnalyzedRun], plan: SurfacePlan, check: Callable[[], None]) -> Callable[[], None] | None:
    """Return what measures the moving statistics anew; None where the line or the run has only one set of them."""
    networks = [run.model.network for run in runs]
    if same_statistics(networks) and runs[0].config.model.freeze_bn:
        return None
    model = runs[0].model
    images = training_images(runs[0], N_REFIT, plan.seed)

    def refit() -> None:
        check()
        estimate_statistics_(model.network, (prepared for prepared, _ in batches(model, images)))

    return refit


def _numbers(run: AnalyzedRun, points: Measurements) -> list[dict[str, Any]]:
    rows = [(float(row["x"]), float(row["y"]), row) for row in points.rows]
    return [
        {"x": x, "y": y} | {role: role_mean(row, domains) for role, domains in run.roles.items()}
        for x, y, row in sorted(rows, key=lambda entry: entry[:2])
    ]
