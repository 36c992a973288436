"""Loss surfaces of finished runs: around one, or along the line between two, on sources and target."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qtdog.analysis.directions import filter_direction
from qtdog.analysis.outcome import Outcome, write_outcome
from qtdog.analysis.passes import batches, losses_by_domain, role_mean
from qtdog.analysis.points import Points
from qtdog.analysis.subject import Subject, all_images, training_images
from qtdog.analysis.surface import Plane, across, between, same_statistics
from qtdog.analysis.surface_figure import draw_surface
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress
from qtdog.training.batch_norm import estimate_statistics_

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
            raise ConfigError("--points must be at least 3, and --reach not negative")

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
    subjects: Sequence[Subject],
    plan: SurfacePlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the loss around one run, or on the line from the first of two runs to the second; return `analysis.json`.

    Around a run the axes are random filter-normalised directions; the second axis of a plane through two runs is one at
    right angles to the line, and as long. Moving statistics of batch norm are measured anew at each point on training
    images of the sources, unless all runs have the same ones.

    Args:
        subjects: one run, or two of one backbone on one data set.
        plan: where.
        folder: where points, table and figures go.
        progress: is told of points; each costs a pass over the images.
        check: called before each batch; may raise to break off.

    Raises:
        ConfigError: more than two runs.
        ModelError: the two runs have different networks.
        RunError: the folder holds points of other settings or runs, or cannot be written.
    """
    if not 1 <= len(subjects) <= 2:
        raise ConfigError(f"a surface is drawn around one run or between two, not {len(subjects)}")
    first, line = subjects[0], len(subjects) == 2
    settings = asdict(plan) | {"runs": [subject.id for subject in subjects]}
    points = Points(folder, ("x", "y"), first.dataset.domains, settings)
    own = plan.ticks(line=False)
    places = list(itertools.product(plan.ticks(line=line), own if plan.n_dims == 2 else [0.0]))
    if any(place not in points for place in places):
        _measure(subjects, plan, places, points, progress=progress, check=check)
    numbers = _numbers(first, points)
    outcome = Outcome(
        kind="surface",
        title=f"Loss from {first.label} to {subjects[1].label}" if line else f"Loss around {first.label}",
        settings=settings,
        runs=[subject.to_json() for subject in subjects],
        numbers=numbers,
        figures=draw_surface(numbers, [subject.label for subject in subjects], folder),
        notes=("Dequantized weights; the line is straight in all parameters.",),
    )
    return write_outcome(folder, outcome)


def _measure(
    subjects: Sequence[Subject],
    plan: SurfacePlan,
    places: Sequence[tuple[float, float]],
    points: Points,
    *,
    progress: Progress,
    check: Callable[[], None],
) -> None:
    first = subjects[0]
    images = all_images(first, plan.n_images, plan.seed)
    with Plane(first.model.network, _axes(subjects, plan), _refit(subjects, plan, check)) as plane:
        for done, place in enumerate(places):
            if place not in points:
                plane.to_(*place[: plan.n_dims])
                losses = losses_by_domain(first.model, images, check=check)
                points.add_(place, [losses.get(domain) for domain in first.dataset.domains])
            if progress is not None:
                progress(done + 1, len(places))


def _axes(subjects: Sequence[Subject], plan: SurfacePlan) -> list[list[Tensor]]:
    networks = [subject.model.network for subject in subjects]
    weights = [parameter.detach().clone() for parameter in networks[0].parameters()]
    if len(networks) == 1:
        return [filter_direction(weights, plan.seed, n) for n in range(plan.n_dims)]
    along = between(*networks)
    return [along] if plan.n_dims == 1 else [along, across(along, weights, plan.seed, 0)]


def _refit(subjects: Sequence[Subject], plan: SurfacePlan, check: Callable[[], None]) -> Callable[[], None] | None:
    """Return what measures the moving statistics anew; None where the line or the run has only one set of them."""
    networks = [subject.model.network for subject in subjects]
    if same_statistics(networks) and subjects[0].config.model.freeze_bn:
        return None
    model = subjects[0].model
    images = training_images(subjects[0], N_REFIT, plan.seed)

    def refit() -> None:
        check()
        estimate_statistics_(model.network, (prepared for prepared, _ in batches(model, images)))

    return refit


def _numbers(subject: Subject, points: Points) -> list[dict[str, Any]]:
    rows = [(float(row["x"]), float(row["y"]), row) for row in points.rows]
    return [
        {"x": x, "y": y} | {role: role_mean(row, domains) for role, domains in subject.roles.items()}
        for x, y, row in sorted(rows, key=lambda entry: entry[:2])
    ]
