"""Curvature of finished runs: trace, largest eigenvalues and spectral density of the Hessian, each with its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import variance
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtdog.analysis.deflation import deflated_trace, overlaps
from qtdog.analysis.hessian_figure import draw_hessian
from qtdog.analysis.hessian_trace import mean_losses, vector_products
from qtdog.analysis.outcome import Outcome, write_outcome
from qtdog.analysis.passes import batches
from qtdog.analysis.points import Points, Row
from qtdog.analysis.spectrum import HessianProduct, Ritz, lanczos, top_eigenvalues
from qtdog.analysis.subject import Subject, domain_images
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress

KEY = ("run", "on", "quantity", "number")
BATCH = 64
MIN_GROUPS = 4  # of each domain, so that the spread over its images is known
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
    """A run's loss as the plan asks for it: the mean over domains, each counting once.

    Attributes:
        network: in evaluation mode.
        domains: groups of images and labels of each domain.
        check: may raise to break off.
    """

    network: nn.Module
    domains: Sequence[Sequence[tuple[Tensor, Tensor]]]
    check: Callable[[], None]

    @property
    def parameters(self) -> list[Tensor]:
        """All of the network."""
        return list(self.network.parameters())

    @property
    def product(self) -> HessianProduct:
        """The Hessian as an operator."""
        return HessianProduct(self.parameters, lambda: (loss for part in self.domains for loss in self.of(part)))

    def of(self, groups: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, float]]:
        """Yield the loss of each group of a domain and its weight in the whole."""
        n_images = sum(len(labels) for _, labels in groups)
        for loss in mean_losses(self.network, groups, n_images * len(self.domains)):
            self.check()
            yield loss


def measure_hessian(
    subjects: Sequence[Subject],
    plan: HessianPlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the Hessian of the mean cross-entropy of every run at its dequantized weights; return `analysis.json`.

    The largest eigenvalues come first: they are taken out of the spread of the trace (`analysis.deflation`). Random
    vectors are added until the standard error of the trace is small enough. Each vector, the eigenvalues and each probe
    of the density are kept in `points.csv` and not computed again.

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
    points = Points(folder, KEY, ("values", "details"), settings)
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
            "standard_error: of the random vectors, for these images. image_error: of the draw of the images.",
            "residual: some eigenvalue lies within this distance of top_eigenvalue.",
        ),
    )
    return write_outcome(folder, outcome)


def _measure(
    subject: Subject, plan: HessianPlan, points: Points, told: Callable[[int], None], check: Callable[[], None]
) -> None:
    curvature = _curvature(subject, plan, check)
    key = (subject.id, plan.on)
    _add_eigenvalues(points, key, curvature, plan)
    told(1)
    while (n := len(_vectors(points, subject, plan))) < plan.max_vectors and not _precise(points, subject, plan):
        _add_vectors(points, key, curvature, range(n, min(n + CHUNK, plan.max_vectors)), plan.seed)
        told(1 + n + CHUNK)
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
    domains = [list(batches(subject.model, part, size=_group_size(len(part.labels)))) for part in parts]
    return Curvature(subject.model.network, domains, check)


def _group_size(n_images: int) -> int:
    return min(BATCH, math.ceil(n_images / MIN_GROUPS))


def _add_eigenvalues(points: Points, key: tuple[str, str], curvature: Curvature, plan: HessianPlan) -> None:
    """Keep the eigenvalues, and what each random vector that may come has in common with theirs."""
    k, asked = plan.n_eigenvalues, range(plan.max_vectors)
    missing = [n for n in asked if (*key, f"overlaps {k}", n) not in points]
    if not missing:
        return
    top = top_eigenvalues(curvature.product, k, seed=plan.seed)
    vectors = torch.from_numpy(np.stack([pair.vector for pair in top], 1))
    squares = overlaps(vectors, curvature.parameters, missing, seed=plan.seed).tolist()
    rows: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
    if (*key, "eigenvalues", k) not in points:
        found = (_joined([pair.value for pair in top]), _joined([pair.residual for pair in top]))
        rows.append(((*key, "eigenvalues", k), found))
    rows += [((*key, f"overlaps {k}", n), (_joined(row), None)) for n, row in zip(missing, squares, strict=True)]
    points.add_all_(rows)


def _add_vectors(points: Points, key: tuple[str, str], curvature: Curvature, wanted: Sequence[int], seed: int) -> None:
    """Keep vᵀ H v of some random vectors, and in it the share of each group of images, by domain."""
    leaves = curvature.parameters
    shares = [
        torch.stack([vector_products(leaves, [loss], wanted, seed=seed).sum(1) for loss in curvature.of(groups)], 1)
        for groups in curvature.domains
    ]
    rows = []
    for row, n in enumerate(wanted):
        parts = [domain[row].tolist() for domain in shares]
        rows.append(((*key, "vector", n), (sum(map(sum, parts)), "; ".join(map(_joined, parts)))))
    points.add_all_(rows)


def _vectors(points: Points, subject: Subject, plan: HessianPlan) -> list[Row]:
    return points.of(run=subject.id, on=plan.on, quantity="vector")


def _trace(points: Points, subject: Subject, plan: HessianPlan) -> tuple[float, float]:
    """Return the trace and its standard error over the random vectors found so far."""
    k, of = plan.n_eigenvalues, {"run": subject.id, "on": plan.on}
    (top,) = points.of(**of, quantity="eigenvalues", number=k)
    common = {row["number"]: _split(row["values"]) for row in points.of(**of, quantity=f"overlaps {k}")}
    found = _vectors(points, subject, plan)
    products = torch.tensor([float(row["values"]) for row in found], dtype=torch.float64)
    squares = torch.tensor([common[row["number"]] for row in found], dtype=torch.float64)
    return deflated_trace(products, squares, torch.tensor(_split(top["values"]), dtype=torch.float64))


def _precise(points: Points, subject: Subject, plan: HessianPlan) -> bool:
    """Whether the trace is known well enough; asked only behind whole chunks, so that a stop changes nothing."""
    n = len(_vectors(points, subject, plan))
    if n < MIN_VECTORS or n % CHUNK:
        return False
    trace, error = _trace(points, subject, plan)
    return error <= plan.error_frac * abs(trace)


def _image_error(rows: Sequence[Row]) -> float | None:
    """Return the standard error of the trace over the images drawn, from the spread of the groups of each domain."""
    found = [[_split(domain) for domain in row["details"].split(";")] for row in rows]
    domains = [
        [sum(shares) / len(found) for shares in zip(*domain, strict=True)] for domain in zip(*found, strict=True)
    ]
    if min(map(len, domains)) < 2:
        return None
    return math.sqrt(sum(len(shares) * variance(shares) for shares in domains))


def _numbers(subject: Subject, plan: HessianPlan, points: Points) -> dict[str, Any]:
    found = _vectors(points, subject, plan)
    (top,) = points.of(run=subject.id, on=plan.on, quantity="eigenvalues", number=plan.n_eigenvalues)
    trace, error = _trace(points, subject, plan)
    ranked = {f"eigenvalue_{n + 1}": value for n, value in enumerate(_split(top["values"]))}
    return {
        "run": subject.label,
        "on": plan.on,
        "trace": trace,
        "standard_error": error,
        "image_error": _image_error(found),
        "n_vectors": len(found),
        "n_parameters": sum(parameter.numel() for parameter in subject.model.network.parameters()),
        "top_eigenvalue": _split(top["values"])[0],
        "residual": _split(top["details"])[0],
    } | ranked


def _probes(points: Points, subject: Subject, plan: HessianPlan) -> list[Ritz]:
    rows = points.of(run=subject.id, on=plan.on, quantity="probe")
    return [_ritz(row) for row in rows[: plan.n_probes]]


def _ritz(row: Row) -> Ritz:
    return Ritz(tuple(_split(row["values"])), tuple(_split(row["details"])))


def _joined(values: Sequence[float]) -> str:
    return " ".join(map(repr, values))


def _split(text: str) -> list[float]:
    return [float(part) for part in text.split()]
