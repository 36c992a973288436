"""Tables of the report page: cells with what they are sorted by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.report.block import Block
from qtdog.report.embed import link
from qtdog.report.labels import differing, value_text
from qtdog.report.marks import MISSING, body, headers
from qtdog.report.table import percent
from qtdog.runs.entry import Entry
from qtdog.runs.selection import outcome

MAX_NUMBERS = 200  # rows of an analysis that are shown; all are in its CSV


@dataclass(frozen=True)
class WebCell:
    """A cell.

    Attributes:
        text: what is shown.
        value: what is sorted by; None for a missing value, which always comes last.
        mark: `best`, `second` or nothing.
        href: where it leads; empty for nowhere.
    """

    text: str
    value: float | str | None
    mark: str = ""
    href: str = ""


@dataclass(frozen=True)
class WebTable:
    """A table that sorts and filters.

    Attributes:
        id: unique in the page.
        caption: what it shows.
        headers: names of the columns.
        rows: cells; the first of each row is its header.
    """

    id: str
    caption: str
    headers: list[str]
    rows: list[list[WebCell]]

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers only."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.headers))]
        return [all(not isinstance(cell.value, str) for cell in column) for column in columns]


def block_table(block: Block, name: str) -> WebTable:
    """Return a table in DomainBed's layout for the page."""
    rows = []
    for row, cells in zip(block.rows, body(block), strict=True):
        accuracies = [row.cells[column].mean for column in block.columns]
        costs = [row.n_trials, row.cost.size.get("bytes"), row.n_models, row.cost.training_steps, row.cost.passes]
        values = [row.method, *accuracies, *costs]
        rows.append([WebCell(cell.text, value, cell.mark) for cell, value in zip(cells, values, strict=True)])
    return WebTable(name, block.title, headers(block), rows)


def settings_table(rows: Mapping[str, Sequence[Entry]], name: str) -> tuple[WebTable, list[tuple[str, str]]]:
    """Return a table of the settings that differ between methods, and those that all have, as (key, value)."""
    settings = {label: group[0].settings for label, group in rows.items() if group[0].settings}
    keys = differing(list(settings.values()))
    cells = [
        [WebCell(label, label), *(_setting(one[key]) if key in one else WebCell("", None) for key in keys)]
        for label, one in settings.items()
    ]
    shared = {key: value for one in settings.values() for key, value in one.items() if key not in keys}
    common = [(key, value_text(value)) for key, value in shared.items()]
    return WebTable(name, "Settings that are not alike in all methods", ["method", *keys], cells), common


def _setting(value: Any) -> WebCell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return WebCell(value_text(value), value if number else value_text(value))


def runs_table(rows: Mapping[str, Sequence[Entry]], split: str, page: Path, name: str) -> WebTable:
    """Return a table of every run, with what its own selection gives and a link to its files."""
    head = ["run", "method", "unseen", "trial", "seed", "selection", "step", "target", "source", "gap", "file"]
    cells = [_run(label, entry, split, page) for label, group in rows.items() for entry in group]
    return WebTable(name, "Every run, with the checkpoint that it ships", head, cells)


def _run(label: str, entry: Entry, split: str, page: Path) -> list[WebCell]:
    selection = entry.selection or "source"
    found = outcome(entry, selection)
    target, source = (None, None) if found is None else (found.on(split), found.source)
    gap = None if target is None or source is None else source - target
    file = entry.path if entry.kind == "domainbed" else entry.path / "result.json"
    step = None if found is None else found.step
    size = entry.cost.size.get("bytes")
    numbers = [WebCell(percent(value), value) for value in (target, source, gap)]
    return [
        WebCell(entry.path.name, entry.path.name, href=link(file, page)),
        WebCell(label, label),
        WebCell(entry.target, entry.target),
        WebCell(str(entry.trial), entry.trial),
        WebCell(str(entry.seed), entry.seed),
        WebCell(selection, selection),
        WebCell(MISSING if step is None else f"{step:,}", step),
        *numbers,
        WebCell(MISSING if size is None else f"{size / 1e6:.3g} MB", size),
    ]


def numbers_table(numbers: Sequence[Mapping[str, Any]], caption: str, name: str) -> WebTable:
    """Return the numbers of an analysis, the first 200 rows of them."""
    keys = list(dict.fromkeys(key for row in numbers for key in row))
    rows = [[_number(row.get(key)) for key in keys] for row in numbers[:MAX_NUMBERS]]
    return WebTable(name, caption, keys, rows)


def _number(value: Any) -> WebCell:
    if value is None:
        return WebCell(MISSING, None)
    if isinstance(value, float):
        return WebCell(f"{value:.4g}", value)
    number = isinstance(value, int) and not isinstance(value, bool)
    return WebCell(value_text(value), value if number else value_text(value))
