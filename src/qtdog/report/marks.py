"""A table's cells as text, with the best of each column marked, and the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qtdog.report.block import GAP, SOURCE, Block, Row
from qtdog.report.cost_table import file_text
from qtdog.report.table import percent
from qtdog.runs.aggregate import Estimate

MISSING = "–"


class Cell(NamedTuple):
    """Text, and `best`, `second` or nothing."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table as it is shown.

    Attributes:
        title: one line.
        about: sentences that a reader needs.
        headers: names of the columns.
        rows: cells under them.
    """

    title: str
    about: list[str]
    headers: list[str]
    rows: list[list[Cell]]


def sheet(block: Block) -> Sheet:
    """Return a table in DomainBed's layout as it is shown."""
    return Sheet(block.title, [block.legend, *block.notes], headers(block), body(block))


def headers(block: Block) -> list[str]:
    """Return the names of all columns of a table."""
    return ["method", *block.columns, "trials", "file", "models", "steps", "passes"]


def body(block: Block) -> list[list[Cell]]:
    """Return a table's rows as cells under `headers`.

    Of each column of unseen domains, their average and the worst the best value is marked, and the second; values that
    read the same are marked alike. Source accuracy and gap are not: a small gap may just be a bad model.
    """
    columns = {name: [row.cells[name] for row in block.rows] for name in block.columns}
    marks = {name: [""] * len(cells) if name in (SOURCE, GAP) else _marks(cells) for name, cells in columns.items()}
    return [
        [
            Cell(row.method),
            *(Cell(estimate_text(row.cells[name]), marks[name][i]) for name in block.columns),
            *(Cell(text) for text in _costs(row)),
        ]
        for i, row in enumerate(block.rows)
    ]


def estimate_text(value: Estimate) -> str:
    """Return mean and standard error in percent with one decimal.

    Example:
        >>> estimate_text(Estimate(0.876, 0.0032, 3)), estimate_text(Estimate(None, None, 0))
        ('87.6 ± 0.3', '–')
    """
    text = percent(value.mean)
    return text if value.error is None else f"{text} ± {percent(value.error)}"


def _marks(column: Sequence[Estimate]) -> list[str]:
    shown = [None if cell.mean is None else float(percent(cell.mean)) for cell in column]
    order = sorted({value for value in shown if value is not None}, reverse=True)
    names = dict(zip(order, ("best", "second"), strict=False)) if len(order) > 1 else {}
    return ["" if value is None else names.get(value, "") for value in shown]


def _costs(row: Row) -> list[str]:
    cost = row.cost
    steps = MISSING if cost.training_steps is None else f"{cost.training_steps:,}"
    file = file_text(cost.size) if "bytes" in cost.size else MISSING
    return [str(row.n_trials), file, str(row.n_models), steps, str(cost.passes)]
