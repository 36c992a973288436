"""Quantization noise of finished runs, layer by layer, against the uniform law."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from torch import Tensor

from qtdog.analysis.analyzed_run import ID_DIGITS, describe_run
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
from qtdog.core.config import Config
from qtdog.core.errors import ModelError, RunError
from qtdog.core.progress import Progress
from qtdog.core.quantized import QuantizedTensor
from qtdog.packing.packed_file import load_packed
from qtdog.runs.find import require_run
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import Checkpoint, checkpoint_folders, read_checkpoint
from qtdog.training.shared_steps import latent_weights

N_BINS = 100
UNIFORM_LEVELS = ("uniform", "symmetric", "half")
EDGE = 0.5 + 2.0**-10  # the division by the step size rounds


@dataclass(frozen=True)
class Noise:
    """What rounding did to one layer, in units of each weight's own step size.

    Attributes:
        n: weights.
        kl: divergence of the histogram from the uniform law over one step, nats; of the weights inside the grid.
        floor: what `kl` is on average for truly uniform noise of as many weights: (B - 1) / 2n with B bins.
        mean: of the noise inside; 0 if it is symmetric.
        mean_error: standard error that the mean of uniform noise would have, 1 / √(12 n).
        positive_frac: share of the noise inside that is above zero.
        std: of the noise inside; 1/√12 = 0.289 if it is uniform.
        clipped_frac: share of the weights beyond the ends of the grid by more than half a step.
        moved_frac: share inside the grid that is not on its nearest point, as OBC and GPTQ do on purpose.
    """

    n: int
    kl: float
    floor: float
    mean: float
    mean_error: float
    positive_frac: float
    std: float
    clipped_frac: float
    moved_frac: float


def layer_noise(latent: Tensor, value: QuantizedTensor) -> tuple[npt.NDArray[np.float64], float, float]:
    """Return noise (n,), clipped share and moved share: (w_q - w) / s of the weights on their nearest point.

    Source of the question: Javed et al., QT-DoG, ICML 2025, section 3.2: rounding as U(-s/2, s/2).

    Args:
        latent: the weights before rounding, the shape of the codes.
        value: codes and step sizes that are saved.

    Raises:
        ModelError: a grid without a common step size (INQ's powers of two): its noise has no unit.

    Example:
        >>> import torch
        >>> from qtdog.core.quantized import QuantSpec
        >>> codes = QuantizedTensor(torch.tensor([[1, 1]], dtype=torch.int8), torch.tensor([2.0]), QuantSpec(2))
        >>> noise, clipped, moved = layer_noise(torch.tensor([[1.5, 9.0]]), codes)
        >>> noise.tolist(), clipped, moved
        ([0.25], 0.5, 0.0)
    """
    spec = value.spec
    if spec.levels not in UNIFORM_LEVELS:
        raise ModelError(f"grid '{spec.levels}' has no common step size, so there is no uniform law to compare with")
    scale = spec.spread(value.scale.double(), latent.shape)
    place = latent.double() / scale
    noise = value.dequantize().double() / scale - place
    low, high = spec.points()[[0, -1]].tolist()
    clipped = (place < low - EDGE) | (place > high + EDGE)
    moved = ~clipped & (noise.abs() > EDGE)
    kept = noise[~clipped & ~moved].clamp(-0.5, 0.5)
    return kept.flatten().cpu().numpy(), clipped.double().mean().item(), moved.double().mean().item()


def describe_noise(noise: npt.NDArray[np.floating], clipped: float, moved: float, *, bins: int = N_BINS) -> Noise:
    """Return the numbers of noise in [-1/2, 1/2].

    Args:
        noise: in units of the step size, one value or more.
        clipped: share of the weights that lie outside.
        moved: share of the weights that are not on their nearest point.
        bins: of the histogram.

    Raises:
        ModelError: no weight is inside the grid.

    Example:
        >>> even = (np.arange(1000) + 0.5) / 1000 - 0.5
        >>> found = describe_noise(even, 0.0, 0.0)
        >>> round(found.kl, 6), round(found.std, 3), found.positive_frac
        (0.0, 0.289, 0.5)
    """
    n = len(noise)
    if n == 0:
        raise ModelError("no weight lies inside the grid, so there is no noise to describe")
    return Noise(
        n=n,
        kl=kl_to_uniform(noise, bins),
        floor=(bins - 1) / (2 * n),
        mean=float(noise.mean()),
        mean_error=1 / math.sqrt(12 * n),
        positive_frac=float((noise > 0).mean()),
        std=float(noise.std()),
        clipped_frac=clipped,
        moved_frac=moved,
    )


def kl_to_uniform(noise: npt.NDArray[np.floating], bins: int = N_BINS) -> float:
    """Return Σ p log(p · B) over the B bins of a histogram on [-1/2, 1/2], nats: 0 for even counts, log B for one bin.

    Of n truly uniform values it is (B - 1) / 2n on average, not 0.

    Example:
        >>> round(kl_to_uniform(np.zeros(5), 100), 4) == round(math.log(100), 4)
        True
    """
    counts, _ = np.histogram(noise, bins=bins, range=(-0.5, 0.5))
    shares = counts[counts > 0] / counts.sum()
    return float((shares * np.log(shares * bins)).sum())


COLUMNS = ("n", "kl", "floor", "mean", "mean_error", "positive_frac", "std", "clipped_frac", "moved_frac", "counts")
ALL = "all layers"


def measure_noise(
    paths: Sequence[Path],
    labels: Sequence[str],
    folder: Path,
    *,
    progress: Progress = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Compare w_q - w with the uniform law, per layer and pooled, in units of each weight's own step size.

    No image is needed: the codes are in the saved file, the weights before rounding in the checkpoint.

    Args:
        paths: folders of quantized runs.
        labels: how each is called.
        folder: where points, table and figure go.
        progress: reports layers.
        check: called before each layer; may raise to break off.

    Raises:
        RunError, ConfigError: as in `runs.find.require_run`, a run without checkpoint, or a float run.
        ModelError: a grid without a common step size.
    """
    points = Measurements(folder, ("run", "layer"), COLUMNS, {"n_bins": N_BINS})
    runs, numbers, pooled = [], [], {}
    for path, label in zip(paths, labels, strict=True):
        run = require_run(path)
        identity = run.model_sha256[:ID_DIGITS]
        _measure(run.folder, run.config, identity, points, progress=progress, check=check)
        rows = points.of(run=identity)
        numbers += [{"run": label} | _row(row) for row in rows]
        pooled[label] = next(_counts(row) for row in rows if row["layer"] == ALL)
        runs.append(describe_run(label, run.folder, run.config) | {"model": identity})
    result = AnalysisResult(
        kind="noise",
        title="Quantization noise against the uniform law",
        settings={"n_bins": N_BINS},
        runs=runs,
        numbers=numbers,
        figures=draw_noise(numbers, pooled, folder),
        notes=(
            "kl is in nats; truly uniform noise of as many weights gives floor on average, and excess is kl - floor.",
            "Noise of the weights inside the grid, each in units of its own step size; clipped ones are counted apart.",
        ),
    )
    return write_result(folder, result)


def _measure(
    run: RunFolder,
    config: Config,
    identity: str,
    points: Measurements,
    *,
    progress: Progress,
    check: Callable[[], None],
) -> None:
    if (identity, ALL) in points:  # written last
        return
    quantized = load_packed(run.model_file).quantized
    if not quantized:
        raise RunError(f"{run.path} saved float weights: there is no rounding to look at")
    latent = latent_weights(_last_checkpoint(run), config)
    pooled: list[npt.NDArray[np.float64]] = []
    outside = np.zeros(3)  # weights, clipped, moved
    for done, (name, value) in enumerate(quantized.items()):
        check()
        noise, clipped, moved = layer_noise(latent[name], value)
        pooled.append(noise)
        outside += np.array([1.0, clipped, moved]) * value.codes.numel()
        if (identity, name) not in points and len(noise):
            _add(points, (identity, name), noise, clipped, moved)
        if progress is not None:
            progress(done + 1, len(quantized))
    _add(points, (identity, ALL), np.concatenate(pooled), outside[1] / outside[0], outside[2] / outside[0])


def _last_checkpoint(run: RunFolder) -> Checkpoint:
    kept = checkpoint_folders(run.checkpoints)
    if not kept:
        text = f"{run.path} has no checkpoint, and only there are the weights before rounding"
        raise RunError(f"{text}. Copy the run with its checkpoint/ folder, or train it again.")
    return read_checkpoint(kept[-1])


def _add(
    points: Measurements, key: tuple[str, str], noise: npt.NDArray[np.float64], clipped: float, moved: float
) -> None:
    counts, _ = np.histogram(noise, bins=N_BINS, range=(-0.5, 0.5))
    found = asdict(describe_noise(noise, float(clipped), float(moved)))
    points.add_(key, [*found.values(), " ".join(map(str, counts.tolist()))])


def _row(row: Mapping[str, str]) -> dict[str, Any]:
    numbers = {name: float(row[name]) for name in COLUMNS[1:-1]}
    return {"layer": row["layer"], "n": int(row["n"]), "excess": numbers["kl"] - numbers["floor"]} | numbers


def _counts(row: Mapping[str, str]) -> list[int]:
    return [int(count) for count in row["counts"].split()]


def draw_noise(numbers: Sequence[Mapping[str, Any]], pooled: Mapping[str, Sequence[int]], folder: Path) -> list[str]:
    """Draw the pooled noise, the KL of each layer with its floor, and the clipped shares; return file names."""
    figure, axes = panels(3)
    for n, (label, counts) in enumerate(pooled.items()):
        layers = [row for row in numbers if row["run"] == label and row["layer"] != ALL]
        _histogram(axes[0], counts, escape_dollar(label), curve_style(n)["color"])
        sizes = [row["n"] for row in layers]
        axes[1].scatter(
            sizes, [row["kl"] for row in layers], s=14, c=curve_style(n)["color"], marker=curve_style(n)["marker"]
        )
        shares = sorted(100 * row["clipped_frac"] for row in layers)
        axes[2].plot(range(1, len(shares) + 1), shares, markersize=3, **curve_style(n))
    _dress(axes, [row["n"] for row in numbers])
    legend(figure, axes[0])
    return save_figure(figure, folder, "noise")


def _histogram(axis: Axes, counts: Sequence[int], label: str, color: str) -> None:
    edges = np.linspace(-0.5, 0.5, len(counts) + 1)
    axis.stairs(np.array(counts) * len(counts) / sum(counts), edges, label=label, color=color)


def _dress(axes: Sequence[Axes], sizes: Sequence[int]) -> None:
    axes[0].axhline(1.0, color="#666666", linestyle=":", label="uniform law")
    axes[0].set_xlabel("(rounded - latent weight) / step size")
    axes[0].set_ylabel("density, all layers")
    axes[0].set_ylim(bottom=0)
    span = np.geomspace(min(sizes), max(sizes), 50)
    axes[1].plot(span, (N_BINS - 1) / (2 * span), color="#666666", linestyle=":")
    axes[1].set(xscale="log", yscale="log", xlabel="weights of the layer", ylabel="KL to uniform (nats); dotted: floor")
    axes[2].set_xlabel("layers, least clipped first")
    axes[2].set_ylabel("clipped weights (%)")
    for axis in axes:
        axis.grid(alpha=0.3)
