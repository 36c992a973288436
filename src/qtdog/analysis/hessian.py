"""Curvature of finished runs: trace, largest eigenvalues and spectral density of the loss's Hessian."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import variance
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtdog.analysis.analyzed_run import AnalyzedRun, batches, domain_images
from qtdog.analysis.measurements import (
    AnalysisResult,
    Measurements,
    Row,
    curve_style,
    escape_dollar,
    legend,
    panels,
    save_figure,
    write_result,
)
from qtdog.core.errors import ConfigError, extra
from qtdog.core.progress import Progress
from qtdog.core.random import derive, numpy_stream, torch_stream


@dataclass(frozen=True)
class BlockTrace:
    """The trace of one diagonal block of the Hessian.

    Attributes:
        trace: the estimate of Σ_i ∂²L/∂w_i² over the block.
        standard_error: of the estimate, from the spread over the random vectors.
        n_weights: weights in the block.
    """

    trace: float
    standard_error: float
    n_weights: int

    @property
    def mean(self) -> float:
        """The mean curvature of a weight: trace / n_weights."""
        return self.trace / self.n_weights


def block_traces(
    parameters: Mapping[str, Tensor],
    losses: Iterable[tuple[Tensor, float]],
    *,
    n_vectors: int = 50,
    seed: int = 0,
) -> dict[str, BlockTrace]:
    """Return the trace of each parameter's block of the Hessian, by Hutchinson's estimator with Rademacher vectors.

    With v of independent entries ±1 over all parameters joined, E[v_lᵀ (H v)_l] = tr H_ll, because blocks of different
    parameters are independent: one Hessian-vector product (a double backward pass) serves all blocks.

    Source: Hutchinson, 1989; block-wise as in HAWQ-V2 (Dong et al., NeurIPS 2020, section 3.2).

    Args:
        parameters: the blocks, by name; leaves that the losses depend on.
        losses: pairs of a scalar loss with its graph and its weight; L is their weighted sum. Each is used up before
            the next is asked for, so that a generator never holds two graphs.
        n_vectors: random vectors, 2 or more.
        seed: of the vectors.

    Raises:
        ValueError: fewer than two vectors, of which no spread could be known.
        RuntimeError: a layer has no second derivative in torch.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> found = block_traces({"w": w}, [((w**2 * torch.tensor([3.0, 0.5])).sum(), 1.0)], n_vectors=2)
        >>> found["w"].trace, found["w"].standard_error
        (7.0, 0.0)
    """
    if n_vectors < 2:
        raise ValueError(f"n_vectors must be at least 2, not {n_vectors}")
    leaves = list(parameters.values())
    products = vector_products(leaves, losses, range(n_vectors), seed=seed)
    errors = products.std(0) / math.sqrt(n_vectors)
    return {
        name: BlockTrace(trace, error, leaf.numel())
        for (name, leaf), trace, error in zip(
            parameters.items(), products.mean(0).tolist(), errors.tolist(), strict=True
        )
    }


def vector_products(
    leaves: Sequence[Tensor], losses: Iterable[tuple[Tensor, float]], numbers: Sequence[int], *, seed: int = 0
) -> Tensor:
    """Return v_lᵀ (H v)_l of each block l for the random vectors with these numbers, float64 (vectors, blocks).

    Their sum over the blocks is vᵀ H v, of which tr H is the mean.

    Args:
        leaves: the blocks.
        losses: as in `block_traces`.
        numbers: of the vectors: number n is the same whichever others are asked for.
        seed: of the vectors.

    Raises:
        RuntimeError: a layer has no second derivative in torch.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> vector_products([w], [((w**2).sum(), 1.0)], [7]).tolist()
        [[4.0]]
    """
    products = torch.zeros(len(numbers), len(leaves), dtype=torch.float64)
    for loss, weight in losses:
        multiply = _multiply(loss, leaves)
        for row, n in enumerate(numbers):
            vectors = rademacher(leaves, seed, n)
            sums = [(v.double() * image.double()).sum() for v, image in zip(vectors, multiply(vectors), strict=True)]
            products[row] += weight * torch.stack(sums).cpu()
        del loss, multiply
    return products


def _multiply(loss: Tensor, leaves: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Return the function v → H v of one loss, both in the shapes of the leaves, by a double backward pass."""
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    curved = [k for k, gradient in enumerate(gradients) if gradient.requires_grad]

    def multiply(vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        if not curved:  # a loss without curvature
            return [torch.zeros_like(leaf) for leaf in leaves]
        outputs, weights = [gradients[k] for k in curved], [vectors[k] for k in curved]
        return torch.autograd.grad(outputs, leaves, weights, retain_graph=True, materialize_grads=True)

    return multiply


def rademacher(leaves: Sequence[Tensor], seed: int, n: int) -> list[Tensor]:
    """Return random vector number `n`: independent signs ±1, in the shapes, types and devices of the leaves.

    Drawn on the CPU, so that every device sees the same.

    Example:
        >>> rademacher([torch.zeros(2, 3)], 0, 0)[0].abs().tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    generator = torch_stream(seed, "rademacher", n)
    drawn = [torch.randint(2, leaf.shape, generator=generator, dtype=torch.int8) * 2 - 1 for leaf in leaves]
    return [part.to(leaf) for part, leaf in zip(drawn, leaves, strict=True)]


def mean_losses(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], n_images: float
) -> Iterator[tuple[Tensor, float]]:
    """Yield the mean cross-entropy of each batch, with its graph and its share of all images, for `block_traces`.

    In evaluation mode and float32; the network's own mode is put back at the end. Attention takes the kernel that has
    a second derivative.

    Args:
        network: images (n, C, H, W) → logits (n, n_classes).
        batches: images and labels (n,), on any device.
        n_images: in all batches together.
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        for images, labels in batches:
            with sdpa_kernel(SDPBackend.MATH):
                loss = functional.cross_entropy(network(images.to(device)), labels.to(device))
            yield loss, len(labels) / n_images
    finally:
        network.train(was_training)


def overlaps(vectors: Tensor, leaves: Sequence[Tensor], numbers: Sequence[int], *, seed: int = 0) -> Tensor:
    """Return (q_i · v_n)² of each random vector of `hessian_trace.vector_products`, float64 (vectors, k).

    Args:
        vectors: q_i of unit length over all leaves joined, shape (n_weights, k).
        leaves: the blocks.
        numbers: of the random vectors.
        seed: of the random vectors.

    Example:
        >>> w = torch.zeros(2)
        >>> overlaps(torch.tensor([[1.0], [0.0]]), [w], range(3)).tolist()
        [[1.0], [1.0], [1.0]]
    """
    known = vectors.to(leaves[0].device, torch.float32).T.contiguous()
    found = torch.empty(len(numbers), len(known), dtype=torch.float64)
    for row, n in enumerate(numbers):
        drawn = torch.cat([part.flatten() for part in rademacher(leaves, seed, n)]).float()
        found[row] = (known @ drawn).double().square().cpu()
    return found


def deflated_trace(products: Tensor, squares: Tensor, values: Tensor) -> tuple[float, float]:
    """Return tr H and its standard error from random vectors, with some eigenvalues taken out of the spread.

    tr H = Σ_i λ_i + E[vᵀ H v - Σ_i λ_i (q_i · v)²], because (q_i · v)² has the mean 1 for every q_i of unit length. For
    exact pairs this is Hutchinson's estimate of what H does at right angles to all q_i. For inexact ones the mean still
    holds; only the spread is larger.

    Source: Hutchinson, 1989; deflation as in Gambhir, Stathopoulos and Orginos, SIAM J. Sci. Comput. 2017, and Hutch++
    (Meyer, Musco, Musco and Woodruff, SOSA 2021).

    Args:
        products: vᵀ H v, float64 (vectors,); two vectors or more.
        squares: (q_i · v)², float64 (vectors, k); see `overlaps`.
        values: λ_i, float64 (k,).

    Example:
        >>> products = torch.tensor([4.0, 0.0])  # of H = 2 q qᵀ with q = (1, 1) / √2, and v = (1, 1) and (1, -1)
        >>> deflated_trace(products, torch.tensor([[2.0], [0.0]]), torch.tensor([2.0]))
        (2.0, 0.0)
    """
    rest = products - squares @ values
    return (values.sum() + rest.mean()).item(), rest.std().item() / math.sqrt(len(rest))


@dataclass(frozen=True)
class Eigenvalue:
    """One eigenvalue λ of the Hessian.

    Attributes:
        value: the estimate.
        residual: ‖H v - λ v‖ for its unit vector: some eigenvalue lies within this distance of `value`.
        vector: v, of unit length, over all parameters joined.
    """

    value: float
    residual: float
    vector: npt.NDArray[np.float64] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Ritz:
    """What one random vector says of the spectrum: point masses that have the first moments of its own share.

    Attributes:
        values: places of the masses, ascending.
        weights: the masses; they add up to 1.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]


class HessianProduct:
    """H v of the mean loss of a network over batches, in evaluation mode and float32, by a double backward pass.

    It is the product that the trace is made of, so that trace, eigenvalues and density are of one matrix, and it fits
    what curvlinops takes as a linear operator; curvlinops' own operator is its reference in the tests.

    Attributes:
        shape, device, dtype: as a linear operator has them.

    Args:
        parameters: that H is about; leaves that the losses depend on.
        losses: gives pairs of a scalar loss with its graph and its weight, as `hessian_trace.mean_losses` does, anew at
            each call.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = HessianProduct([w], lambda: [((w**2 * torch.tensor([3.0, 0.5])).sum(), 1.0)])
        >>> (hessian @ torch.tensor([1.0, 1.0])).tolist()
        [6.0, 1.0]
    """

    def __init__(self, parameters: Sequence[Tensor], losses: Callable[[], Iterable[tuple[Tensor, float]]]) -> None:
        self._parameters, self._losses = list(parameters), losses
        n = sum(parameter.numel() for parameter in self._parameters)
        self.shape = (n, n)
        self.device, self.dtype = self._parameters[0].device, self._parameters[0].dtype

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Return H v, shape (n,)."""
        parts = vector.split([parameter.numel() for parameter in self._parameters])
        shaped = [part.reshape(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]
        total = torch.zeros_like(vector)
        for loss, weight in self._losses():
            total += weight * torch.cat([image.flatten() for image in _multiply(loss, self._parameters)(shaped)])
        return total


def lanczos(product: HessianProduct, n_steps: int, seed: int, n: int) -> Ritz:
    """Return what random vector number `n` says of the spectrum, after some Lanczos steps.

    Source: Papyan, JMLR 2020, algorithm 2, as curvlinops has it; Ghorbani et al., ICML 2019.

    Raises:
        ModelError: curvlinops is not installed.
    """
    run = _curvlinops_lanczos()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "lanczos", n))  # curvlinops draws from the global state
        values, vectors = run(product, n_steps)
    return Ritz(tuple(values.double().tolist()), tuple(vectors[0].double().square().tolist()))


def _curvlinops_lanczos() -> Callable[..., tuple[Tensor, Tensor]]:
    with extra("curvature", "the spectral density needs curvlinops"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that it imports
        from curvlinops.papyan2020traces.spectrum import fast_lanczos
    return fast_lanczos


def top_eigenvalues(product: HessianProduct, k: int, *, seed: int = 0, tolerance: float = 1e-2) -> list[Eigenvalue]:
    """Return the k largest eigenvalues, largest first, each with its residual.

    By the implicitly restarted Lanczos method (ARPACK through SciPy) on Hessian-vector products.

    Args:
        product: the Hessian.
        k: how many, below n.
        seed: of the start vector.
        tolerance: relative accuracy that ARPACK is asked for.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: the eigenvalues are not found in ARPACK's limit of steps.
    """

    def multiply(vector: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        given = torch.from_numpy(np.asarray(vector, dtype=np.float32).reshape(-1)).to(product.device, product.dtype)
        return (product @ given).cpu().double().numpy()

    make, solve = cast(Any, LinearOperator), cast(Any, eigsh)  # scipy's types do not know these arguments
    operator = make(product.shape, matvec=multiply, dtype=np.float64)
    start = numpy_stream(seed, "eigenvalues").standard_normal(product.shape[0])
    values, vectors = solve(operator, k=k, which="LA", tol=tolerance, v0=start)
    found = [
        Eigenvalue(float(value), float(np.linalg.norm(multiply(vector) - value * vector)), vector)
        for value, vector in zip(values, vectors.T, strict=True)
    ]
    return sorted(found, key=lambda eigenvalue: -eigenvalue.value)


def density(
    parts: Sequence[Ritz], grid: npt.NDArray[np.floating], width: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the spectral density on a grid and its standard error over the random vectors.

    φ(t) = mean over the vectors of Σ_i weight_i · N(t; value_i, width²): stochastic Lanczos quadrature.

    Source: Ghorbani et al., ICML 2019, Eq. 5 to 7.

    Args:
        parts: of two random vectors or more.
        grid: places t.
        width: of the Gaussian that smooths.

    Example:
        >>> mean, error = density([Ritz((0.0,), (1.0,))] * 2, np.array([0.0]), 1.0)
        >>> round(mean.item(), 4), error.item()
        (0.3989, 0.0)
    """
    curves = np.array([_smoothed(part, grid, width) for part in parts])
    return curves.mean(0), curves.std(0, ddof=1) / math.sqrt(len(curves))


def _smoothed(part: Ritz, grid: npt.NDArray[np.floating], width: float) -> npt.NDArray[np.float64]:
    distances = (grid[:, None] - np.array(part.values)[None]) / width
    return np.exp(-(distances**2) / 2) @ np.array(part.weights) / (width * math.sqrt(2 * math.pi))


N_GRID = 400
WIDTH_FRAC = 1 / 100  # of the span of all spectra: the Gaussian that smooths
FLOOR = 0.1  # of what one eigenvalue by itself adds: below it a log axis shows numerical dust


def draw_hessian(
    numbers: Sequence[Mapping[str, Any]], densities: Mapping[str, Sequence[Ritz]], folder: Path
) -> list[str]:
    """Draw trace and eigenvalues with their errors, and the densities with a band; return the names of the files.

    Args:
        numbers: a row per run, as the table has them.
        densities: the probes of each run by its label; empty to leave the panel out.
        folder: where to.
    """
    figure, axes = panels(3 if densities else 2)
    _bars(axes[0], numbers, "trace", "standard_error")
    axes[0].set_ylabel("trace of the Hessian")
    _bars(axes[1], numbers, "top_eigenvalue", "residual")
    axes[1].set_ylabel("largest eigenvalue")
    if densities:
        _densities(axes[2], densities, numbers)
    legend(figure, axes[0])
    return save_figure(figure, folder, "hessian")


def _bars(axis: Axes, numbers: Sequence[Mapping[str, Any]], name: str, error: str) -> None:
    for n, row in enumerate(numbers):
        look = curve_style(n)
        axis.errorbar(
            [n], [row[name]], yerr=[row[error]], label=escape_dollar(row["run"]), capsize=4, linestyle="none", **look
        )
    axis.set_xticks(range(len(numbers)), [str(n + 1) for n in range(len(numbers))])
    axis.set_xlabel("run, in the order of the legend")
    axis.set_xlim(-0.6, len(numbers) - 0.4)
    highest = max(row[name] + row[error] for row in numbers)
    axis.set_ylim(min(0.0, *(row[name] - row[error] for row in numbers), 0.0), 1.1 * max(highest, 0.0) or 1.0)
    axis.grid(alpha=0.3)


def _densities(axis: Axes, densities: Mapping[str, Sequence[Ritz]], numbers: Sequence[Mapping[str, Any]]) -> None:
    places = [value for probes in densities.values() for probe in probes for value in probe.values]
    span = max(places) - min(places) or 1.0
    grid = np.linspace(min(places) - 0.05 * span, max(places) + 0.05 * span, N_GRID)
    width = WIDTH_FRAC * span
    lowest = FLOOR / (numbers[0]["n_parameters"] * width * math.sqrt(2 * math.pi))
    highest = 0.0
    for n, (row, probes) in enumerate(zip(numbers, densities.values(), strict=True)):
        mean, error = density(probes, grid, width)
        highest = max(highest, float(mean.max()))
        color = curve_style(n)["color"]
        axis.plot(grid, mean, color=color)
        axis.fill_between(
            grid, np.maximum(mean - error, lowest), np.maximum(mean + error, lowest), color=color, alpha=0.2
        )
        found = [value for name, value in row.items() if name.startswith("eigenvalue_")]
        axis.plot(found, [lowest * 10 ** (0.25 * (n + 1))] * len(found), "|", color=color, markersize=9, clip_on=False)
    axis.set_yscale("log")
    axis.set_ylim(lowest, 3 * highest)
    axis.set_xlabel("eigenvalue of the Hessian (strokes: the largest)")
    axis.set_ylabel("spectral density")
    axis.grid(alpha=0.3)


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
            raise ConfigError(f"--num-vectors must be at least {MIN_VECTORS}, and --error above 0")
        if self.n_probes == 1 or self.n_eigenvalues < 1:
            raise ConfigError(
                "--num-eigenvalues must be 1 or more, and --num-probes 0, or 2 and more to know their spread"
            )


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
    runs: Sequence[AnalyzedRun],
    plan: HessianPlan,
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the Hessian of the mean cross-entropy of every run at its dequantized weights; return `analysis.json`.

    The largest eigenvalues come first: they are taken out of the spread of the trace (`analysis.hessian`). Random
    vectors are added until the standard error of the trace is small enough. Each vector, the eigenvalues and each probe
    of the density are kept in `points.csv` and not computed again.

    Args:
        runs: the runs, of one data set.
        plan: what is measured.
        folder: where points, table and figures go.
        progress: reports units of work; the trace may need fewer vectors than at most.
        check: called before each batch; may raise to break off.

    Raises:
        ConfigError: the target of a run without one is asked for.
        ModelError: curvlinops is not installed, and the density is asked for.
        RunError: the folder holds points of other settings, or cannot be written.
    """
    settings = {"n_images": plan.n_images, "seed": plan.seed, "n_steps": plan.n_steps}
    points = Measurements(folder, KEY, ("values", "details"), settings)
    each = plan.max_vectors + 1 + plan.n_probes
    numbers = []
    for s, run in enumerate(runs):
        report = (lambda done, s=s: progress(s * each + done, len(runs) * each)) if progress else lambda done: None
        _measure(run, plan, points, report, check)
        numbers.append(_numbers(run, plan, points))
    densities = {run.label: _probes(points, run, plan) for run in runs} if plan.n_probes else {}
    result = AnalysisResult(
        kind="hessian",
        title=f"Curvature of the loss on the {plan.on}",
        settings=asdict(plan),
        runs=[run.to_json() for run in runs],
        numbers=numbers,
        figures=draw_hessian(numbers, densities, folder),
        notes=(
            "Dequantized weights, evaluation mode, all parameters.",
            "standard_error: of the random vectors, for these images. image_error: of the draw of the images.",
            "residual: some eigenvalue lies within this distance of top_eigenvalue.",
        ),
    )
    return write_result(folder, result)


def _measure(
    run: AnalyzedRun, plan: HessianPlan, points: Measurements, report: Callable[[int], None], check: Callable[[], None]
) -> None:
    curvature = _curvature(run, plan, check)
    key = (run.id, plan.on)
    _add_eigenvalues(points, key, curvature, plan)
    report(1)
    while (n := len(_vectors(points, run, plan))) < plan.max_vectors and not _precise(points, run, plan):
        _add_vectors(points, key, curvature, range(n, min(n + CHUNK, plan.max_vectors)), plan.seed)
        report(1 + n + CHUNK)
    report(plan.max_vectors + 1)
    for n in range(plan.n_probes):
        if (*key, "probe", n) not in points:
            probe = lanczos(curvature.product, plan.n_steps, plan.seed, n)
            points.add_((*key, "probe", n), (_text(probe.values), _text(probe.weights)))
        report(plan.max_vectors + 2 + n)


def _curvature(run: AnalyzedRun, plan: HessianPlan, check: Callable[[], None]) -> Curvature:
    if plan.on not in run.roles:
        raise ConfigError(f"{run.folder.path} has no target domain; take --on sources")
    parts = [domain_images(run, domain, plan.n_images, plan.seed) for domain in run.roles[plan.on]]
    domains = [list(batches(run.model, part, size=_group_size(len(part.labels)))) for part in parts]
    return Curvature(run.model.network, domains, check)


def _group_size(n_images: int) -> int:
    return min(BATCH, math.ceil(n_images / MIN_GROUPS))


def _add_eigenvalues(points: Measurements, key: tuple[str, str], curvature: Curvature, plan: HessianPlan) -> None:
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
        found = (_text([pair.value for pair in top]), _text([pair.residual for pair in top]))
        rows.append(((*key, "eigenvalues", k), found))
    rows += [((*key, f"overlaps {k}", n), (_text(row), None)) for n, row in zip(missing, squares, strict=True)]
    points.add_all_(rows)


def _add_vectors(
    points: Measurements, key: tuple[str, str], curvature: Curvature, wanted: Sequence[int], seed: int
) -> None:
    """Keep vᵀ H v of some random vectors, and in it the share of each group of images, by domain."""
    leaves = curvature.parameters
    shares = [
        torch.stack([vector_products(leaves, [loss], wanted, seed=seed).sum(1) for loss in curvature.of(groups)], 1)
        for groups in curvature.domains
    ]
    rows = []
    for row, n in enumerate(wanted):
        parts = [domain[row].tolist() for domain in shares]
        rows.append(((*key, "vector", n), (sum(map(sum, parts)), "; ".join(map(_text, parts)))))
    points.add_all_(rows)


def _vectors(points: Measurements, run: AnalyzedRun, plan: HessianPlan) -> list[Row]:
    return points.of(run=run.id, on=plan.on, quantity="vector")


def _trace(points: Measurements, run: AnalyzedRun, plan: HessianPlan) -> tuple[float, float]:
    """Return the trace and its standard error over the random vectors found so far."""
    k, of = plan.n_eigenvalues, {"run": run.id, "on": plan.on}
    (top,) = points.of(**of, quantity="eigenvalues", number=k)
    common = {row["number"]: _split(row["values"]) for row in points.of(**of, quantity=f"overlaps {k}")}
    found = _vectors(points, run, plan)
    products = torch.tensor([float(row["values"]) for row in found], dtype=torch.float64)
    squares = torch.tensor([common[row["number"]] for row in found], dtype=torch.float64)
    return deflated_trace(products, squares, torch.tensor(_split(top["values"]), dtype=torch.float64))


def _precise(points: Measurements, run: AnalyzedRun, plan: HessianPlan) -> bool:
    """Whether the trace is known well enough; asked only behind whole chunks, so that a stop changes nothing."""
    n = len(_vectors(points, run, plan))
    if n < MIN_VECTORS or n % CHUNK:
        return False
    trace, error = _trace(points, run, plan)
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


def _numbers(run: AnalyzedRun, plan: HessianPlan, points: Measurements) -> dict[str, Any]:
    found = _vectors(points, run, plan)
    (top,) = points.of(run=run.id, on=plan.on, quantity="eigenvalues", number=plan.n_eigenvalues)
    trace, error = _trace(points, run, plan)
    ranked = {f"eigenvalue_{n + 1}": value for n, value in enumerate(_split(top["values"]))}
    return {
        "run": run.label,
        "on": plan.on,
        "trace": trace,
        "standard_error": error,
        "image_error": _image_error(found),
        "n_vectors": len(found),
        "n_parameters": sum(parameter.numel() for parameter in run.model.network.parameters()),
        "top_eigenvalue": _split(top["values"])[0],
        "residual": _split(top["details"])[0],
    } | ranked


def _probes(points: Measurements, run: AnalyzedRun, plan: HessianPlan) -> list[Ritz]:
    rows = points.of(run=run.id, on=plan.on, quantity="probe")
    return [_ritz(row) for row in rows[: plan.n_probes]]


def _ritz(row: Row) -> Ritz:
    return Ritz(tuple(_split(row["values"])), tuple(_split(row["details"])))


def _text(values: Sequence[float]) -> str:
    return " ".join(map(repr, values))


def _split(text: str) -> list[float]:
    return [float(part) for part in text.split()]
