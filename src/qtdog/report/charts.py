"""What the charts of the report page draw: numbers only, in percent, by name of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtdog.report.inputs import Timed
from qtdog.runs.aggregate import AVERAGE, GAP, SOURCE, WORST, Aggregate
from qtdog.runs.finished import FinishedRun, risk_points
from qtdog.runs.record import Record
from qtdog.runs.statistics import Estimate

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
