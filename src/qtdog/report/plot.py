"""Accuracy over steps, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from qtdog.runs.record import Record


@dataclass(frozen=True)
class Curve:
    """One run over its steps.

    Attributes:
        method: its label.
        target: name of the unseen domain.
        records: its evaluations.
        start_step: the first quantized step, or None for a float run.
    """

    method: str
    target: str
    records: Sequence[Record]
    start_step: int | None


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """Draw source (dashed) and target (solid) accuracy over steps to `path`, a panel per target.

    A vertical line marks the step at which quantization began.
    """
    targets = sorted({curve.target for curve in curves})
    figure, axes = plt.subplots(1, len(targets), figsize=(5.2 * len(targets), 3.8), sharey=True, squeeze=False)
    for axis, target in zip(axes[0], targets, strict=True):
        _panel(axis, [curve for curve in curves if curve.target == target])
        axis.set_title(f"unseen domain: {target}")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(3, len(labels)), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05 + 0.05 * ((len(labels) + 2) // 3), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axis: Axes, curves: Sequence[Curve]) -> None:
    marked = set()
    for curve, colour in zip(curves, mpl.color_sequences["tab10"], strict=False):
        steps = [record.seen.step for record in curve.records]
        source = [100 * record.seen.source_accuracy for record in curve.records]
        target = [100 * (record.test_accuracy or 0.0) for record in curve.records]
        axis.plot(steps, target, color=colour, label=f"{curve.method}: target", marker="o", markersize=3)
        axis.plot(steps, source, color=colour, label=f"{curve.method}: source", linestyle="--", alpha=0.7)
        if curve.start_step is not None and curve.start_step not in marked:
            marked.add(curve.start_step)
            axis.axvline(curve.start_step, color="grey", linestyle=":", label="quantization starts")
