"""Curvature of finished runs: trace, largest eigenvalues and spectral density of the Hessian, each with its error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qtdog.analysis.hessian_figure import draw_hessian
from qtdog.analysis.hessian_trace import mean_losses, vector_products
from qtdog.analysis.outcome import Outcome, write_outcome
from qtdog.analysis.passes import batches
from qtdog.analysis.points import Points, Row
from qtdog.analysis.spectrum import HessianProduct, Ritz, lanczos, top_eigenvalues
from qtdog.analysis.subject import Subject, domain_images
from qtdog.core.errors import ConfigError
from qtdog.data.dataset import Progress

KEY = ("run", "on", "quantity", "number")
BATCH = 64
CHUNK = 5
MIN_VECTORS = 10


@dataclass(frozen=True)
class HessianPlan:
    """What is measured of each run.

    Attributes:
        on: `sources` (held-out images) or `target`.
        n_images: of each domain.
        max_vectors: random vectors of the trace at most.
        error_frac: standard error, as a share of the trace, that is precise enough.
        n_eigenvalues: largest ones.
        n_probes: random vectors of the density; 0 for none.
        n_steps: Lanczos steps of each.
        seed: of the images and of all vectors.

    Raises:
        ConfigError: numbers that make no sense.
    """

    on: str = "sources"
    n_images: int = 64
    max_vectors: int = 500
    error_frac: float = 0.05
    n_eigenvalues: int = 3
    n_probes: int = 4
    n_steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.max_vectors < MIN_VECTORS or self.error_frac <= 0:
            raise ConfigError(f"--vectors must be at least {MIN_VECTORS}, and --error above 0")
        if self.n_probes == 1 or self.n_eigenvalues < 1:
            raise ConfigError("--eigenvalues must be at least 1, and --probes 0, or 2 and more to know their spread")


@dataclass(frozen=True)
class Curvature:
    """A run's loss as the plan asks for it.

    Attributes:
        parameters: all of the network.
        losses: gives the loss by batches, anew at each call.
        check: may raise to break off.
    """

    parameters: Sequence[Tensor]
    losses: Callable[[], Any]
    check: Callable[[], None]

    @property
    def product(self) -> HessianProduct:
        """The Hessian as an operator."""
        return HessianProduct(self.parameters, self.losses, self.check)


def measure_hessian(
    subjects: Sequence[Subject],
    plan: HessianPlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the Hessian of the mean cross-entropy of every run at its dequantized weights; return `analysis.json`.

    Random vectors are added until the standard error of the trace is small enough. Each vector, the largest eigenvalues
    and each probe of the density are kept in `points.csv` and not computed again.

    Args:
        subjects: the runs, of one data set.
        plan: what is measured.
        folder: where points, table and figures go.
        progress: is told of units of work; the trace may need fewer vectors than at most.
        check: called before each batch; may raise to break off.

    Raises:
        ConfigError: the target of a run without one is asked for.
        ModelError: curvlinops is not installed, and the density is asked for.
        RunError: the folder holds points of other settings, or cannot be written.
    """
    settings = {"n_images": plan.n_images, "seed": plan.seed, "n_steps": plan.n_steps}
    points = Points(folder, KEY, ("values", "weights"), settings)
    each = plan.max_vectors + 1 + plan.n_probes
    numbers = []
    for s, subject in enumerate(subjects):
        told = (lambda done, s=s: progress(s * each + done, len(subjects) * each)) if progress else lambda done: None
        _measure(subject, plan, points, told, check)
        numbers.append(_numbers(subject, plan, points))
    densities = {subject.label: _probes(points, subject, plan) for subject in subjects} if plan.n_probes else {}
    outcome = Outcome(
        kind="hessian",
        title=f"Curvature of the loss on the {plan.on}",
        settings=asdict(plan),
        runs=[subject.to_json() for subject in subjects],
        numbers=numbers,
        figures=draw_hessian(numbers, densities, folder),
        notes=(
            "Dequantized weights, evaluation mode, all parameters.",
            "residual: some eigenvalue lies within this distance of top_eigenvalue.",
        ),
    )
    return write_outcome(folder, outcome)


def _measure(
    subject: Subject, plan: HessianPlan, points: Points, told: Callable[[int], None], check: Callable[[], None]
) -> None:
    curvature = _curvature(subject, plan, check)
    key = (subject.id, plan.on)
    while len(found := _traces(points, subject, plan)) < plan.max_vectors and not _precise(found, plan):
        wanted = range(len(found), min(len(found) + CHUNK, plan.max_vectors))
        products = vector_products(curvature.parameters, curvature.losses(), wanted, seed=plan.seed).sum(1)
        for n, value in zip(wanted, products.tolist(), strict=True):
            points.add_((*key, "vector", n), (value, None))
        told(wanted[-1] + 1)
    if (*key, "eigenvalues", plan.n_eigenvalues) not in points:
        top = top_eigenvalues(curvature.product, plan.n_eigenvalues, seed=plan.seed)
        values, residuals = [pair.value for pair in top], [pair.residual for pair in top]
        points.add_((*key, "eigenvalues", plan.n_eigenvalues), (_joined(values), _joined(residuals)))
    told(plan.max_vectors + 1)
    for n in range(plan.n_probes):
        if (*key, "probe", n) not in points:
            probe = lanczos(curvature.product, plan.n_steps, plan.seed, n)
            points.add_((*key, "probe", n), (_joined(probe.values), _joined(probe.weights)))
        told(plan.max_vectors + 2 + n)


def _curvature(subject: Subject, plan: HessianPlan, check: Callable[[], None]) -> Curvature:
    if plan.on not in subject.roles:
        raise ConfigError(f"{subject.folder.path} has no target domain; take --on sources")
    parts = [domain_images(subject, domain, plan.n_images, plan.seed) for domain in subject.roles[plan.on]]
    images = [batch for part in parts for batch in batches(subject.model, part, size=BATCH)]
    n_images = sum(len(labels) for _, labels in images)
    network = subject.model.network

    def losses() -> Any:
        for loss in mean_losses(network, images, n_images):
            check()
            yield loss

    return Curvature(list(network.parameters()), losses, check)


def _traces(points: Points, subject: Subject, plan: HessianPlan) -> list[float]:
    return [float(row["values"]) for row in points.of(run=subject.id, on=plan.on, quantity="vector")]


def _precise(found: Sequence[float], plan: HessianPlan) -> bool:
    """Whether the trace is known well enough; asked only behind whole chunks, so that a stop changes nothing."""
    if len(found) < MIN_VECTORS or len(found) % CHUNK:
        return False
    return _standard_error(found) <= plan.error_frac * abs(statistics.fmean(found))


def _standard_error(found: Sequence[float]) -> float:
    return statistics.stdev(found) / math.sqrt(len(found))


def _numbers(subject: Subject, plan: HessianPlan, points: Points) -> dict[str, Any]:
    found = _traces(points, subject, plan)
    (top,) = points.of(run=subject.id, on=plan.on, quantity="eigenvalues", number=plan.n_eigenvalues)
    trace, error = statistics.fmean(found), _standard_error(found)
    ranked = {f"eigenvalue_{n + 1}": value for n, value in enumerate(_split(top["values"]))}
    return {
        "run": subject.label,
        "on": plan.on,
        "trace": trace,
        "standard_error": error,
        "n_vectors": len(found),
        "n_parameters": sum(parameter.numel() for parameter in subject.model.network.parameters()),
        "top_eigenvalue": _split(top["values"])[0],
        "residual": _split(top["weights"])[0],
    } | ranked


def _probes(points: Points, subject: Subject, plan: HessianPlan) -> list[Ritz]:
    rows = points.of(run=subject.id, on=plan.on, quantity="probe")
    return [_ritz(row) for row in rows[: plan.n_probes]]


def _ritz(row: Row) -> Ritz:
    return Ritz(tuple(_split(row["values"])), tuple(_split(row["weights"])))


def _joined(values: Sequence[float]) -> str:
    return " ".join(map(repr, values))


def _split(text: str) -> list[float]:
    return [float(part) for part in text.split()]
