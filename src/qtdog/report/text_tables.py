"""Tables as text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qtdog.report.tables import GAP, SOURCE, Block, Row, file_text, markdown, percent
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


CSV_COLUMNS = (
    *("dataset", "split", "selection", "method", "column", "mean", "standard_error", "n"),
    *("trials", "models", "steps", "passes", "bytes"),
)
MARKS = {"best": "*", "second": "+"}
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "…": r"\dots{}",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "√": r"$\surd$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\n": " ",
} | {character: f"\\{character}" for character in "&%$#_"}


def text(sheets: Sequence[Sheet]) -> str:
    """Return the tables for a terminal: `*` behind the best of a column, `+` behind the second."""
    return "\n\n".join(_text_sheet(one) for one in sheets) + "\n"


def _text_sheet(shown: Sheet) -> str:
    cells = [[_one_line(cell.text) + MARKS.get(cell.mark, " ") for cell in row] for row in shown.rows]
    lines = [[f"{_one_line(name)} " for name in shown.headers], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown.headers))]
    padded = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(row)).rstrip()
        for row in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rule = "-" * max(map(len, padded))
    marks = ["* best, + second of the column."] if _marked(shown) else []
    about = map(_one_line, [shown.title, *shown.about, *marks])
    return "\n".join([*about, "", padded[0], rule, *padded[1:]])


def _marked(shown: Sheet) -> bool:
    return any(cell.mark for row in shown.rows for cell in row)


def _one_line(value: str) -> str:
    """Return text that cannot reach the terminal as more than characters of one line."""
    return "".join(character if character.isprintable() else "?" for character in value)


def to_markdown(sheets: Sequence[Sheet]) -> str:
    """Return the tables in Markdown: best bold, second underlined (`<ins>`)."""
    parts = []
    for one in sheets:
        rows = [[_markdown_cell(cell) for cell in row] for row in one.rows]
        about = " ".join(map(_no_markup, _about(one)))
        table = markdown([_no_markup(name) for name in one.headers], rows)
        parts.append(f"**{_no_markup(one.title)}**\n\n{about}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _about(shown: Sheet) -> list[str]:
    return [*shown.about, *(["Best bold, second underlined."] if _marked(shown) else [])]


def _markdown_cell(cell: Cell) -> str:
    value = _no_markup(cell.text)
    return {"best": f"**{value}**", "second": f"<ins>{value}</ins>"}.get(cell.mark, value)


def _no_markup(value: str) -> str:
    for character, plain in {"&": "&amp;", "<": "&lt;", "*": "\\*", "`": "\\`", "[": "\\["}.items():
        value = value.replace(character, plain)
    return value


def latex(sheets: Sequence[Sheet]) -> str:
    """Return a `table` environment per table, to be used with `booktabs`: best bold, second underlined."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex_sheet(one) for one in sheets)


def _latex_sheet(shown: Sheet) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\small",
        rf"\caption{{{' '.join(map(escape_latex, [f'{shown.title}.', *_about(shown)]))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(shown.headers) - 1)}}}",
        r"\toprule",
        " & ".join(map(escape_latex, shown.headers)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_latex_cell, row)) + r" \\" for row in shown.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(cell: Cell) -> str:
    command = {"best": r"\textbf", "second": r"\underline"}.get(cell.mark)
    value = escape_latex(cell.text)
    return f"{command}{{{value}}}" if command else value


def escape_latex(value: str) -> str:
    r"""Return text that LaTeX prints as it is.

    Example:
        >>> print(escape_latex("art_painting 87 % ± 1"))
        art\_painting 87 \% $\pm$ 1
    """
    return "".join(LATEX.get(character, character) for character in value)


def to_csv(sheets: Sequence[Sheet]) -> str:
    """Return the tables as they are shown, one after another, separated by commas."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for one in sheets:
        writer.writerow(map(_no_formula, one.headers))
        writer.writerows([_no_formula(cell.text) for cell in row] for row in one.rows)
    return stream.getvalue()


def numbers_csv(blocks: Sequence[Block]) -> str:
    """Return one line per table, row and column: percent with six decimals; empty where nothing was measured.

    The columns are `dataset`, `split`, `selection`, `method`, `column`, `mean`, `standard_error`, `n`, and of the row
    `trials`, `models`, `steps`, `passes`, `bytes`.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for block in blocks:
        for row in block.rows:
            cost = [row.n_trials, row.n_models, row.cost.training_steps, row.cost.passes, row.cost.size.get("bytes")]
            for name, cell in row.cells.items():
                about = [block.dataset, block.split, block.selection, row.method, name]
                writer.writerow([*map(_no_formula, about), _number(cell.mean), _number(cell.error), cell.n, *cost])
    return stream.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.6f}"


def _no_formula(value: str) -> str:
    """Return text that no spreadsheet takes for a formula; numbers stay numbers.

    Example:
        >>> _no_formula("=1+1"), _no_formula("−0.4"), _no_formula("+0.4")
        ("'=1+1", '-0.4', '+0.4')
    """
    value = value.replace("−", "-")
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?( … [+-]?\d+(\.\d+)?)?", value)
    return value if number or value[:1] not in ("=", "+", "-", "@") else f"'{value}"


SHEETS: dict[str, Callable[[Sequence[Sheet]], str]] = {
    "text": text,
    "markdown": to_markdown,
    "latex": latex,
    "csv": to_csv,
}


def render(blocks: Sequence[Block], kind: str) -> str:
    """Return tables in DomainBed's layout as `text`, `markdown`, `latex` or `csv` (all numbers, one per line)."""
    return numbers_csv(blocks) if kind == "csv" else SHEETS[kind]([sheet(block) for block in blocks])
