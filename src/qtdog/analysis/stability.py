"""How steady accuracy is over the steps of a run, and how far selection on the sources can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import kendalltau, rankdata, spearmanr

from qtdog.analysis.analyzed_run import describe_run
from qtdog.analysis.measurements import (
    AnalysisResult,
    curve_style,
    escape_dollar,
    legend,
    mark_start,
    panels,
    save_figure,
    write_result,
    write_table,
)
from qtdog.core.config import Config
from qtdog.core.errors import DataError, RunError
from qtdog.core.random import numpy_stream
from qtdog.runs.find import open_run
from qtdog.runs.record import Record

N_BOOTSTRAP = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Stability:
    """What the evaluations of one run say.

    Attributes:
        n_checkpoints: evaluations that could have been saved.
        source_std: standard deviation of the source accuracy over them.
        target_std: of the target accuracy.
        largest_drop: of the target accuracy from one evaluation to the next.
        spearman: rank correlation of source-validation and target accuracy; None where one of them never changes, or
            with fewer than three.
        spearman_low, spearman_high: 95 % interval, from resampling the evaluations.
        kendall: Kendall's τ_b of the same.
        selected: target accuracy where the source accuracy is highest (training-domain validation).
        best: highest target accuracy: what an oracle would save.
    """

    n_checkpoints: int
    source_std: float
    target_std: float
    largest_drop: float
    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None
    kendall: float | None
    selected: float
    best: float


def stability(records: Sequence[Record], rng: np.random.Generator) -> Stability | None:
    """Return what the selectable evaluations of a run say; None without a target or with fewer than two of them.

    Neighbouring checkpoints are alike, so they are fewer independent observations than they are rows, and the interval
    is too narrow rather than too wide.

    Args:
        records: of a run, in order.
        rng: draws the resamples.
    """
    pairs = [
        (record.seen.source_accuracy, record.test_accuracy)
        for record in records
        if record.seen.selectable and record.test_accuracy is not None
    ]
    if len(pairs) < 2:
        return None
    source, target = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    low, high = interval(source, target, rng)
    return Stability(
        n_checkpoints=len(pairs),
        source_std=float(source.std(ddof=1)),
        target_std=float(target.std(ddof=1)),
        largest_drop=float(max(0.0, -np.diff(target).min())),
        spearman=rank_correlation(source, target),
        spearman_low=low,
        spearman_high=high,
        kendall=_known(cast(Any, kendalltau(source, target)).statistic) if _varied(source, target) else None,
        selected=float(target[source.argmax()]),
        best=float(target.max()),
    )


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Spearman's ρ; None if one side never changes or there are fewer than three values.

    Example:
        >>> round(rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0, 90.0])), 6)
        1.0
    """
    return _known(cast(Any, spearmanr(one, other)).statistic) if _varied(one, other) else None


def interval(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[float | None, float | None]:
    """Return a 95 % interval of Spearman's ρ from resampled pairs; (None, None) where it cannot be had.

    Example:
        >>> low, high = interval(np.arange(9.0), np.arange(9.0), np.random.Generator(np.random.Philox(0)))
        >>> round(low, 6), round(high, 6)
        (1.0, 1.0)
    """
    if not _varied(one, other):
        return None, None
    drawn = rng.integers(len(one), size=(N_BOOTSTRAP, len(one)))
    ranks = [rankdata(side[drawn], axis=1) for side in (one, other)]
    centered = [rank - rank.mean(1, keepdims=True) for rank in ranks]
    lengths = np.sqrt((centered[0] ** 2).sum(1) * (centered[1] ** 2).sum(1))
    found = (centered[0] * centered[1]).sum(1)[lengths > 0] / lengths[lengths > 0]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _varied(one: np.ndarray, other: np.ndarray) -> bool:
    return len(one) > 2 and len(np.unique(one)) > 1 and len(np.unique(other)) > 1


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


Run = tuple[str, Config, list[Record]]
CURVES = "curves.csv"


def measure_stability(paths: Sequence[Path], labels: Sequence[str], folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """Read the evaluations of runs, finished or not, draw them, and return what `analysis.json` says.

    Args:
        paths: run folders.
        labels: how each is called.
        folder: where tables and figure go.
        seed: of the resamples.

    Raises:
        RunError: no folder of a run, or one without an evaluation.
        DataError: the runs have different data sets.
    """
    runs: list[Run] = []
    described = []
    for path, label in zip(paths, labels, strict=True):
        run, config = open_run(path)
        records = run.read_metrics()
        if not records:
            raise RunError(f"{path} has no evaluation yet (metrics.jsonl)")
        runs.append((label, config, records))
        described.append(describe_run(label, run, config))
    contents = {config.data.content for _, config, _ in runs}
    if len(contents) > 1:
        raise DataError("these runs have different data sets; compare runs on one data set")
    write_table(folder / CURVES, [row for run in runs for row in _curve(*run)])
    numbers = [
        _numbers(label, config, stability(records, numpy_stream(seed, label))) for label, config, records in runs
    ]
    result = AnalysisResult(
        kind="stability",
        title="Stability of training, and how far selection on the sources can be trusted",
        settings={"seed": seed},
        runs=described,
        numbers=numbers,
        figures=draw_stability(runs, folder),
        notes=(
            "Over the evaluations that could have been saved, which for a quantized run are those after its start.",
            "Neighbouring checkpoints are alike: the interval of spearman is too narrow rather than too wide.",
        ),
    )
    return write_result(folder, result)


def _curve(label: str, config: Config, records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "run": label,
            "step": record.seen.step,
            "selectable": record.seen.selectable,
            "source_accuracy": record.seen.source_accuracy,
            "target_accuracy": record.test_accuracy,
            "start_step": _start(config),
        }
        for record in records
    ]


def _start(config: Config) -> int | None:
    return None if config.quantizer.name == "none" else config.start_step


def _numbers(label: str, config: Config, found: Stability | None) -> dict[str, Any]:
    names = Stability.__dataclass_fields__
    values = dict.fromkeys(names) if found is None else asdict(found)
    return {"run": label, "target": config.data.target} | values


def draw_stability(runs: Sequence[Run], folder: Path) -> list[str]:
    """Draw source and target accuracy over steps, and one against the other; return the names of the files."""
    figure, axes = panels(3)
    for n, (label, _, records) in enumerate(runs):
        steps = [record.seen.step for record in records]
        source = [100 * record.seen.source_accuracy for record in records]
        target = [float("nan") if r.test_accuracy is None else 100 * r.test_accuracy for r in records]
        look = curve_style(n)
        axes[0].plot(steps, source, label=escape_dollar(label), markersize=3, **look)
        axes[1].plot(steps, target, markersize=3, **look)
        usable = [i for i, record in enumerate(records) if record.seen.selectable]
        axes[2].plot([source[i] for i in usable], [target[i] for i in usable], linestyle="none", markersize=4, **look)
    for axis in axes[:2]:
        mark_start(axis, [_start(config) for _, config, _ in runs])
        axis.set_xlabel("step")
    _dress(axes)
    legend(figure, axes[0])
    return save_figure(figure, folder, "stability")


def _dress(axes: Sequence[Axes]) -> None:
    axes[0].set_ylabel("accuracy on the sources (%)")
    axes[1].set_ylabel("accuracy on the unseen domain (%)")
    axes[2].set_xlabel("accuracy on the sources (%)")
    axes[2].set_ylabel("accuracy on the unseen domain (%)")
    axes[2].set_title("checkpoints that could be saved")
    for axis in axes:
        axis.grid(alpha=0.3)
