"""What the charts of the report page draw: numbers only, in percent, by name of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtdog.report.inputs import Timed
from qtdog.report.tables import AVERAGE, GAP, SOURCE, WORST, Block
from qtdog.runs.aggregate import Estimate
from qtdog.runs.finished import FinishedRun
from qtdog.runs.record import Record

Rows = Mapping[str, Sequence[FinishedRun]]
Chart = dict[str, Any]


def curves_chart(rows: Rows) -> Chart:
    """Return accuracy over steps, a panel per unseen domain: for each row mean, smallest and largest over its trials.

    The steps are those that all runs of the row evaluated.
    """
    targets = sorted({entry.target for group in rows.values() for entry in group if entry.records})
    panels = [{"title": target, **_panel(rows, target)} for target in targets]
    return {"kind": "lines", "x": "step", "y": "accuracy (%)", "panels": [one for one in panels if one["series"]]}


def _panel(rows: Rows, target: str) -> Chart:
    series, starts = [], set()
    for label, group in rows.items():
        runs = [entry for entry in group if entry.target == target and entry.records]
        starts |= {entry.start_step for entry in runs if entry.start_step is not None}
        for part in ("target", "source") if runs else ():
            points = _points([{r.seen.step: _accuracy(r, part) for r in entry.records} for entry in runs])
            if points:
                series.append({"name": label, "part": part, "points": points})
    return {"series": series, "marks": [{"x": start, "text": "quantization starts"} for start in sorted(starts)]}


def _accuracy(record: Record, part: str) -> float | None:
    return record.seen.source_accuracy if part == "source" else record.test_accuracy


def _points(runs: Sequence[Mapping[int, float | None]]) -> list[list[float]]:
    """Return (step, mean, smallest, largest, number of runs) for each step that all runs have."""
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    points = []
    for step in steps:
        values = [value for run in runs if (value := run[step]) is not None]
        if values:
            numbers = (sum(values) / len(values), min(values), max(values))
            points.append([step, *(round(100 * number, 3) for number in numbers), len(values)])
    return points


def dots_chart(blocks: Sequence[Block]) -> Chart:
    """Return for each way to choose checkpoints the average of each row with its standard error, and its domains."""
    return {"kind": "dots", "x": "accuracy (%)", "sets": {block.selection: _dots(block) for block in blocks}}


def _dots(block: Block) -> list[Chart]:
    domains = [column for column in block.columns if column not in (AVERAGE, WORST, SOURCE, GAP)]
    found = []
    for row in block.rows:
        parts = {domain: _percent(row.cells[domain].mean) for domain in domains}
        main = main_cell(block, row.cells)
        if main.mean is not None:
            found.append({"name": row.method, "y": _percent(main.mean), "e": _percent(main.error), "domains": parts})
    return found


def main_cell(block: Block, cells: Mapping[str, Estimate]) -> Estimate:
    """Return the one number that stands for a row: the average, or with one unseen domain that domain's."""
    return cells[AVERAGE] if AVERAGE in cells else cells[block.columns[0]]


def size_chart(blocks: Sequence[Block]) -> Chart:
    """Return accuracy over megabytes on disk."""
    sizes = {row.method: row.cost.size["bytes"] / 1e6 for block in blocks for row in block.rows if row.cost.size}
    return _cost_chart(blocks, sizes, "file (MB)")


def latency_chart(blocks: Sequence[Block], latencies: Mapping[str, Timed]) -> Chart:
    """Return accuracy over milliseconds per call, as `qtdog bench` measured them."""
    return _cost_chart(blocks, {name: one.p50_ms for name, one in latencies.items()}, "median latency (ms)")


def _cost_chart(blocks: Sequence[Block], costs: Mapping[str, float], label: str) -> Chart:
    sets = {}
    for block in blocks:
        cells = {row.method: main_cell(block, row.cells) for row in block.rows if row.method in costs}
        sets[block.selection] = [
            {"name": name, "x": round(costs[name], 4), "y": _percent(cell.mean), "e": _percent(cell.error)}
            for name, cell in cells.items()
            if cell.mean is not None
        ]
    return {"kind": "points", "x": label, "y": "accuracy (%)", "sets": sets}


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 3)
