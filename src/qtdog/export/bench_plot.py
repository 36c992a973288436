"""Compared models as points: latency against accuracy, or against size where no accuracy was measured."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from qtdog.export.bench import Bench
from qtdog.export.bench_stats import pareto


def plot_bench(bench: Bench, path: Path) -> None:
    """Draw the models of a comparison to `path`; a line joins those that no other beats in both respects.

    Across: median latency, with the spread between it and the 95th percentile. Up: accuracy if every model has one,
    else size of the file.

    Args:
        bench: what was measured.
        path: a .png.
    """
    rows = bench.rows
    with_accuracy = all(row.accuracy is not None for row in rows)
    latencies = [1e3 * row.timing.p50_s for row in rows]
    tails = [1e3 * max(row.timing.p95_s - row.timing.p50_s, 0) for row in rows]
    heights = [100 * row.accuracy if row.accuracy is not None else row.file_bytes / 1e6 for row in rows]
    if not with_accuracy:
        heights = [row.file_bytes / 1e6 for row in rows]
    best = pareto(latencies, [-height if with_accuracy else height for height in heights])
    figure, axis = plt.subplots(figsize=(7, 4.8))
    for row, x, y, tail in zip(rows, latencies, heights, tails, strict=True):
        axis.errorbar(x, y, xerr=[[0], [tail]], fmt="o", capsize=3, label=f"{row.label}, {row.runtime}")
    axis.plot([latencies[k] for k in best], [heights[k] for k in best], color="tab:grey", linestyle="--", zorder=0)
    axis.set_xlabel(f"latency of {bench.batch} image(s), {bench.threads} thread(s): median, and up to p95 (ms)")
    axis.set_ylabel("accuracy (%)" if with_accuracy else "file (MB)")
    axis.set_xlim(left=0)
    axis.margins(x=0.1, y=0.15)
    axis.grid(alpha=0.3)
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05 + 0.05 * ((len(rows) + 2) // 3), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
