"""Pictures: accuracy over steps, and methods against a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtdog.runs.record import Record
from qtdog.runs.statistics import Comparison


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


def curves_figure(curves: Sequence[Curve]) -> Figure:
    """Return a figure of source (dashed) and target (solid) accuracy over steps, a panel per target.

    A vertical line marks the step at which quantization began.
    """
    targets = sorted({curve.target for curve in curves})
    figure = Figure(figsize=(5.2 * len(targets), 3.8))
    axes = figure.subplots(1, len(targets), sharey=True, squeeze=False)
    for axis, target in zip(axes[0], targets, strict=True):
        _panel(axis, [curve for curve in curves if curve.target == target])
        axis.set_title(f"unseen domain: {target}")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(3, len(labels)), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05 + 0.05 * ((len(labels) + 2) // 3), 1, 1))
    return figure


def _panel(axis: Axes, curves: Sequence[Curve]) -> None:
    marked = set()
    for curve, colour in zip(curves, mpl.color_sequences["tab10"], strict=False):
        steps = [record.seen.step for record in curve.records]
        source = [100 * record.seen.source_accuracy for record in curve.records]
        if all(record.test_accuracy is not None for record in curve.records):
            target = [100 * (record.test_accuracy or 0.0) for record in curve.records]
            axis.plot(steps, target, color=colour, label=f"{curve.method}: target", marker="o", markersize=3)
        axis.plot(steps, source, color=colour, label=f"{curve.method}: source", linestyle="--", alpha=0.7)
        if curve.start_step is not None and curve.start_step not in marked:
            marked.add(curve.start_step)
            axis.axvline(curve.start_step, color="grey", linestyle=":", label="quantization starts")


mpl.use("Agg")


def plot_differences(panels: Mapping[str, Mapping[str, Comparison]], reference: str, path: Path) -> None:
    """Draw a panel for each measure and a line for each method: mean difference (points), 95 % interval, single pairs.

    Args:
        panels: title → method → its comparison with the reference; methods stand in the order of the first panel, top
            down. A method without an interval (one pair) is drawn hollow. The interval of two pairs is
            so wide that it may end outside of the panel, which shows every pair and the intervals of three or more.
        reference: the method at zero.
        path: image file to write; its folder is made. The ending decides the format.

    Raises:
        OSError: the file cannot be written.
        ValueError: no panel, or an unknown format of image.
    """
    methods = list(dict.fromkeys(method for rows in panels.values() for method in rows))
    size = (4.6 * len(panels) + 1, 0.34 * len(methods) + 1.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        _forest_panel(axis, methods, rows)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"points − {reference}")
    labels = [f"{method}  ({max(rows[method].n for rows in panels.values() if method in rows)})" for method in methods]
    axes[0][0].set_yticks(range(len(methods)), labels)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _forest_panel(axis: Axes, methods: list[str], rows: Mapping[str, Comparison]) -> None:
    axis.set_xlim(_limits(rows.values()))
    axis.axvline(0, color="grey", linewidth=1)
    axis.grid(axis="x", alpha=0.3)
    for y, method in enumerate(methods):
        comparison = rows.get(method)
        if comparison is None:
            continue
        axis.scatter(
            [100 * one for one in comparison.differences], [y] * comparison.n, s=8, color="tab:grey", alpha=0.4
        )
        known = comparison.low is not None and comparison.high is not None
        if known:
            axis.plot([100 * (comparison.low or 0.0), 100 * (comparison.high or 0.0)], [y, y], color="tab:blue")
        axis.plot(100 * comparison.mean, y, "o", color="tab:blue", fillstyle="full" if known else "none", markersize=6)


def _limits(comparisons: Iterable[Comparison]) -> tuple[float, float]:
    """Return the ends of a panel in points: around zero, every pair, and the intervals of three pairs or more."""
    values = [0.0]
    for one in comparisons:
        ends = [one.low, one.high] if one.n > 2 else []
        values += [100 * value for value in [*one.differences, *ends] if value is not None]
    margin = 0.05 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin
