"""Local flatness of finished runs, on sources and target, point by point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qtdog.analysis.directions import Displaced
from qtdog.analysis.figures import legend, panels, plain, save, style
from qtdog.analysis.flatness import check_directions, numbered, summarise, weight_norm
from qtdog.analysis.outcome import Outcome, write_outcome
from qtdog.analysis.passes import losses_by_domain, role_mean, shift
from qtdog.analysis.points import Points
from qtdog.analysis.subject import Subject, all_images
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress

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
            raise ConfigError(f"--directions: {error}") from error
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
    subjects: Sequence[Subject],
    plan: FlatnessPlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure F_γ of every run on its sources (held-out images) and its target; return what `analysis.json` says.

    The weights are those that ship, dequantized; all parameters move, of every run the same ones. The loss of each
    place is kept in `points.csv`, and is not measured again. One place costs one pass over the images.

    Args:
        subjects: the runs, of one data set.
        plan: what is measured.
        folder: where points, table and figures go.
        progress: is told of passes over the images.
        check: called before each batch; may raise to break off.

    Raises:
        RunError: the folder holds points of other settings, or cannot be written.
        ConfigError, DataError: as in `analysis.subject.domain_images`.
    """
    settings = {"n_images": plan.n_images, "seed": plan.seed}
    points = Points(folder, KEY, subjects[0].dataset.domains, settings)
    n_places = len(plan.places)
    for s, subject in enumerate(subjects):
        shifted = shift(progress, s * n_places, len(subjects) * n_places)
        _measure(subject, plan, points, progress=shifted, check=check)
    numbers = [row for subject in subjects for row in flatness_numbers(subject, plan, points)]
    figures = [name for kind in plan.gammas for name in draw_flatness(numbers, kind, folder)]
    return write_outcome(folder, _outcome(subjects, plan, settings, numbers, figures))


def _measure(
    subject: Subject, plan: FlatnessPlan, points: Points, *, progress: Progress, check: Callable[[], None]
) -> None:
    places = plan.places
    missing = [(i, place) for i, place in enumerate(places) if (subject.id, *place) not in points]
    if not missing:
        return
    images = all_images(subject, plan.n_images, plan.seed)
    with Displaced(subject.model.network) as moved:
        direction = lru_cache(maxsize=1)(moved.direction)  # the radii and the opposite of one follow each other
        for i, (kind, n, gamma) in missing:
            steps = []
            if n != BASE[1]:
                number, sign = numbered(int(n), antithetic=True)
                steps = [(sign * gamma, direction(plan.seed, number, kind))]
            moved.to_(*steps)
            _add(points, subject, (kind, n, gamma), losses_by_domain(subject.model, images, check=check))
            if progress is not None:
                progress(i + 1, len(places))


def _add(points: Points, subject: Subject, key: tuple[Any, ...], losses: Mapping[str, float]) -> None:
    points.add_((subject.id, *key), [losses.get(domain) for domain in subject.dataset.domains])


def flatness_numbers(subject: Subject, plan: FlatnessPlan, points: Points) -> list[dict[str, Any]]:
    """Return the rows of the table of one run: F_γ on sources and target at every radius of every kind."""
    rows = {(row["radius"], row["direction"], float(row["gamma"])): row for row in points.of(run=subject.id)}
    norm = weight_norm(subject.model.network)
    numbers = []
    for role, domains in subject.roles.items():
        base = role_mean(rows[BASE], domains)
        for kind, gammas in plan.gammas.items():
            rises = [
                [role_mean(rows[kind, str(n), gamma], domains) - base if gamma else 0.0 for gamma in gammas]
                for n in range(plan.n_directions)
            ]
            found = summarise(gammas, torch.tensor(rises, dtype=torch.float64), antithetic=True)
            who = {"run": subject.label, "on": role, "radius": kind, "loss": base, "weight_norm": norm}
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
            _curve(axis, [row for row in shown if (row["on"], row["run"]) == (role, label)], plain(label), style(n))
        axis.set_title("sources (held-out images)" if role == "sources" else "target (unseen domain)")
        axis.set_xlabel(XLABELS[kind])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rise of the loss F (nats)")
    legend(figure, axes[0])
    return save(figure, folder, "flatness" if kind == "absolute" else "flatness-filter")


def _curve(axis: Any, rows: Sequence[Mapping[str, Any]], label: str, look: Mapping[str, Any]) -> None:
    gammas, means = [row["gamma"] for row in rows], [row["increase"] for row in rows]
    errors = [row["standard_error"] for row in rows]
    axis.plot(gammas, means, label=label, markersize=4, **look)
    low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
    axis.fill_between(gammas, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _outcome(
    subjects: Sequence[Subject],
    plan: FlatnessPlan,
    settings: Mapping[str, Any],
    numbers: Sequence[Mapping[str, Any]],
    figures: Sequence[str],
) -> Outcome:
    return Outcome(
        kind="flatness",
        title="Local flatness: rise of the loss at distance γ from the weights",
        settings={**settings, "n_directions": plan.n_directions, "gammas": dict(plan.gammas)},
        runs=[subject.to_json() for subject in subjects],
        numbers=numbers,
        figures=figures,
        notes=(
            "Dequantized weights; every parameter moves; opposite directions; bands are one standard error over pairs.",
            "An absolute radius favours networks of large weights: compare weight_norm, and the filter radius.",
        ),
    )
