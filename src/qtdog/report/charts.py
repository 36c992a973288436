"""Pictures of results: charts of the report's page as data, and figures of matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtdog.core.printable import legend_columns
from qtdog.report.inputs import Timed
from qtdog.runs.aggregate import AVERAGE, GAP, SOURCE, WORST, Aggregate
from qtdog.runs.finished import FinishedRun, risk_points
from qtdog.runs.record import Record
from qtdog.runs.statistics import Comparison, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Mapping[str, Sequence[FinishedRun]]
Chart = dict[str, Any]


def curves_chart(rows: Rows) -> Chart:
    """Return accuracy over steps, a panel per unseen domain: for each row mean, smallest and largest over its trials.

    The steps are those that all runs of the row evaluated. What has no steps of its own, as an ensemble, is one point
    at the last step of the others.
    """
    targets = sorted({run.target for group in rows.values() for run in group if run.records})
    panels = [{"title": target, **_panel(rows, target)} for target in targets]
    return {"kind": "lines", "x": "step", "y": "accuracy (%)", "panels": [one for one in panels if one["series"]]}


def _panel(rows: Rows, target: str) -> Chart:
    series, starts = [], set()
    for label, group in rows.items():
        runs = [run for run in group if run.target == target and run.records]
        starts |= {run.start_step for run in runs if run.start_step is not None}
        for part in ("target", "source") if runs else ():
            points = _points([{r.seen.step: _accuracy(r, part) for r in run.records} for run in runs])
            if points:
                series.append({"name": label, "part": part, "points": points})
    last = max((point[0] for one in series for point in one["points"]), default=None)
    for label, group in rows.items() if last is not None else ():
        runs = [run.saved for run in group if run.target == target and not run.records and run.saved is not None]
        for part in ("target", "source") if runs else ():
            points = _points([{last: one.source if part == "source" else one.target} for one in runs])
            if points:
                series.append({"name": label, "part": part, "points": points})
    return {"series": series, "marks": [{"x": start, "text": "quantization starts"} for start in sorted(starts)]}


def _accuracy(record: Record, part: str) -> float | None:
    return record.seen.source_accuracy if part == "source" else record.test_accuracy


def _points(runs: Sequence[Mapping[Any, float | None]]) -> list[list[float]]:
    """Return (place, mean, smallest, largest, number of runs) for each place, like a step, that all runs have."""
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    points = []
    for step in steps:
        values = [value for run in runs if (value := run[step]) is not None]
        if values:
            numbers = (sum(values) / len(values), min(values), max(values))
            points.append([step, *(round(100 * number, 3) for number in numbers), len(values)])
    return points


def risk_chart(rows: Rows) -> Chart:
    """Return errors over the share of answered images, a panel per unseen domain: for each row mean and range."""
    panels = []
    for target in sorted({run.target for group in rows.values() for run in group}):
        series = []
        for label, group in rows.items():
            runs = [run for run in group if run.target == target]
            for part in ("target", "source"):
                curves = [risk_points(run, "test" if part == "target" else part) for run in runs]
                points = _points(curves) if curves and all(curves) else []
                shown = [[round(100 * point[0], 3), *point[1:]] for point in points]
                if shown:
                    series.append({"name": label, "part": part, "points": shown})
        panels.append({"title": target, "series": series, "marks": []})
    return {
        "kind": "lines",
        "x": "answered (%)",
        "y": "errors (%)",
        "panels": [one for one in panels if any(s["part"] == "target" for s in one["series"])],
    }


def dots_chart(tables: Sequence[Aggregate]) -> Chart:
    """Return for each selection the average of each row with its standard error, and its domains."""
    return {"kind": "dots", "x": "accuracy (%)", "sets": {one.selection: _dots(one) for one in tables}}


def _dots(numbers: Aggregate) -> list[Chart]:
    domains = [column for column in numbers.columns if column not in (AVERAGE, WORST, SOURCE, GAP)]
    dots = []
    for row in numbers.rows:
        parts = {domain: _percent(row.cells[domain].mean) for domain in domains}
        main = main_cell(numbers, row.cells)
        if main.mean is not None:
            dots.append({"name": row.method, "y": _percent(main.mean), "e": _percent(main.error), "domains": parts})
    return dots


def main_cell(numbers: Aggregate, cells: Mapping[str, Estimate]) -> Estimate:
    """Return the one number that stands for a row: the average, or with one unseen domain that domain's."""
    return cells[AVERAGE] if AVERAGE in cells else cells[numbers.columns[0]]


def size_chart(tables: Sequence[Aggregate]) -> Chart:
    """Return accuracy over megabytes on disk."""
    sizes = {row.method: row.cost.size["bytes"] / 1e6 for one in tables for row in one.rows if row.cost.size}
    return _cost_chart(tables, sizes, "file (MB)")


def latency_chart(tables: Sequence[Aggregate], latencies: Mapping[str, Timed]) -> Chart:
    """Return accuracy over milliseconds per call, as `qtdog bench` measured them."""
    return _cost_chart(tables, {name: one.p50_ms for name, one in latencies.items()}, "median latency (ms)")


def _cost_chart(tables: Sequence[Aggregate], costs: Mapping[str, float], label: str) -> Chart:
    sets = {}
    for numbers in tables:
        cells = {row.method: main_cell(numbers, row.cells) for row in numbers.rows if row.method in costs}
        sets[numbers.selection] = [
            {"name": name, "x": round(costs[name], 4), "y": _percent(cell.mean), "e": _percent(cell.error)}
            for name, cell in cells.items()
            if cell.mean is not None
        ]
    return {"kind": "points", "x": label, "y": "accuracy (%)", "sets": sets}


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 3)


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
    from matplotlib.figure import Figure  # not above: the page draws its charts without it

    targets = sorted({curve.target for curve in curves})
    figure = Figure(figsize=(5.2 * len(targets), 3.8))
    axes = figure.subplots(1, len(targets), sharey=True, squeeze=False)
    for axis, target in zip(axes[0], targets, strict=True):
        _draw_curves(axis, [curve for curve in curves if curve.target == target])
        axis.set_title(f"unseen domain: {target}")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    ncols = legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="lower center", ncols=ncols, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05 + 0.05 * -(-len(labels) // ncols), 1, 1))
    return figure


def _draw_curves(axis: Axes, curves: Sequence[Curve]) -> None:
    import matplotlib as mpl

    marked = set()
    for curve, color in zip(curves, mpl.color_sequences["tab10"], strict=False):
        steps = [record.seen.step for record in curve.records]
        source = [100 * record.seen.source_accuracy for record in curve.records]
        if all(record.test_accuracy is not None for record in curve.records):
            target = [100 * (record.test_accuracy or 0.0) for record in curve.records]
            axis.plot(steps, target, color=color, label=f"{curve.method}: target", marker="o", markersize=3)
        axis.plot(steps, source, color=color, label=f"{curve.method}: source", linestyle="--", alpha=0.7)
        if curve.start_step is not None and curve.start_step not in marked:
            marked.add(curve.start_step)
            axis.axvline(curve.start_step, color="grey", linestyle=":", label="quantization starts")


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
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(method for rows in panels.values() for method in rows))
    size = (4.6 * len(panels) + 1, 0.34 * len(methods) + 1.5)
    figure = Figure(figsize=size)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
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
