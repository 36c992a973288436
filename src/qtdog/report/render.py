"""The one table model, and how it is written: text, Markdown, LaTeX, CSV. The page of `report.html` draws it too."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.printable import one_line
from qtdog.core.safe_text import csv_line

MISSING = "–"
MARKS = {"best": "*", "second": "+"}
MAX_LATEX_ROWS = 40  # of one page
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
    "→": r"$\rightarrow$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\n": " ",
} | {character: f"\\{character}" for character in "&%$#_"}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown.
        mark: `best`, `second` or nothing.
        value: what a reader's program sorts by; None for a missing value, which always comes last.
        href: where it leads on a page; empty for nowhere.
    """

    text: str
    mark: str = ""
    value: float | str | None = None
    href: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: one line.
        headers: names of the columns.
        rows: cells under them; the first of each row is its name.
        notes: sentences that a reader needs.
        id: unique in a page; empty elsewhere.
    """

    title: str
    headers: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    id: str = ""

    @cached_property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers only."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.headers))]
        return [all(not isinstance(cell.value, str) for cell in column) for column in columns]

    def only(self, names: Sequence[str]) -> Table:
        """Return the table with its first column and those that are named, in the order of the names.

        Raises:
            ConfigError: there is no such column, with the nearest one.
        """
        for name in names:
            if name not in self.headers:
                raise ConfigError(unknown("column", name, self.headers))
        places = [0, *(self.headers.index(name) for name in names if name != self.headers[0])]
        rows = [[row[place] for place in places] for row in self.rows]
        return replace(self, headers=[self.headers[place] for place in places], rows=rows)

    @property
    def marked(self) -> bool:
        """Whether a cell is marked as the best or the second."""
        return any(cell.mark for row in self.rows for cell in row)


def text_cells(rows: Sequence[Sequence[str]]) -> list[list[Cell]]:
    """Return rows of texts as cells."""
    return [[Cell(text) for text in row] for row in rows]


def to_text(tables: Sequence[Table], width: int | None = None) -> str:
    """Return the tables for a terminal: `*` behind the best of a column, `+` behind the second.

    A table that is wider than the terminal continues below itself, with the names of its rows repeated. No cell is cut
    off or broken into lines.

    Args:
        tables: to be written, one after another.
        width: of the terminal in characters; None to write every row on one line, for a file or another program.
    """
    return "\n\n".join(_text(table, width) for table in tables) + "\n"


def _text(table: Table, width: int | None) -> str:
    marks = ["* best, + second of the column."] if table.marked else []
    about = [one_line(line) for line in [table.title, *table.notes, *marks] if line]
    if width is not None:
        about = [part for line in about for part in textwrap.wrap(line, max(width, 20)) or [""]]
    return "\n".join([*about, *([""] if about else []), text_grid(table, width)])


def text_grid(table: Table, width: int | None = None) -> str:
    """Return header, rule and rows of a table as text, as in `to_text`."""
    space = " " if table.marked else ""
    cells = [[one_line(cell.text) + MARKS.get(cell.mark, space) for cell in row] for row in table.rows]
    lines = [[f"{one_line(name)}{space}" for name in table.headers], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.headers))]
    right = [i > 0 and _reads_as_numbers([row[i] for row in table.rows]) for i in range(len(widths))]
    grids = []
    for group in _column_groups(widths, width):
        padded = [
            "  ".join(line[i].rjust(widths[i]) if right[i] else line[i].ljust(widths[i]) for i in group).rstrip()
            for line in lines
        ]
        grids.append("\n".join([padded[0], "-" * max(map(len, padded)), *padded[1:]]))
    return "\n\n".join(grids)


def _reads_as_numbers(cells: Sequence[Cell]) -> bool:
    return all(cell.text[:1] in "–−-+0123456789" for cell in cells)  # an empty cell is none of them, and fits


def _column_groups(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Return the columns that stand beside each other, the first one in each group."""
    if width is None or len(widths) < 2:
        return [list(range(len(widths)))]
    groups, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if len(groups[-1]) > 1 and used + 2 + widths[i] > width:
            groups.append([0])
            used = widths[0]
        groups[-1].append(i)
        used += 2 + widths[i]
    return groups


def to_markdown(tables: Sequence[Table], width: int | None = None) -> str:
    """Return the tables in Markdown: best bold, second underlined (`<ins>`)."""
    del width
    parts = []
    for table in tables:
        rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
        about = " ".join(map(_no_markup, _about(table)))
        grid = markdown([_no_markup(name) for name in table.headers], rows)
        parts.append("\n\n".join(part for part in (f"**{_no_markup(table.title)}**", about, grid) if part))
    return "\n\n".join(parts) + "\n"


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a Markdown table; a cell cannot break out of it.

    Example:
        >>> print(markdown(["a"], [["x|y"]]))
        | a |
        | --- |
        | x\|y |
    """
    lines = [headers, ["---"] * len(headers), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _about(table: Table) -> list[str]:
    return [*table.notes, *(["Best bold, second underlined."] if table.marked else [])]


def _markdown_cell(cell: Cell) -> str:
    value = _no_markup(cell.text)
    return {"best": f"**{value}**", "second": f"<ins>{value}</ins>"}.get(cell.mark, value)


def _no_markup(value: str) -> str:
    for character, plain in {"&": "&amp;", "<": "&lt;", "*": "\\*", "`": "\\`", "[": "\\["}.items():
        value = value.replace(character, plain)
    return value


def to_latex(tables: Sequence[Table], width: int | None = None) -> str:
    """Return a `table` environment per table: best bold, second underlined. It needs `booktabs` and `graphicx`.

    A table that is wider than the text is scaled down to it; after 40 rows another environment goes on.
    """
    del width
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(
        _latex(table, table.rows[first : first + MAX_LATEX_ROWS], first > 0)
        for table in tables
        for first in range(0, max(1, len(table.rows)), MAX_LATEX_ROWS)
    )


def _latex(table: Table, rows: Sequence[Sequence[Cell]], continued: bool) -> str:
    caption = [f"{table.title} (continued)."] if continued else [f"{table.title}.", *_about(table)]
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\small",
        rf"\caption{{{' '.join(map(escape_latex, caption))}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(table.headers) - 1)}}}",
        r"\toprule",
        " & ".join(map(escape_latex, table.headers)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_latex_cell, row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
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


def to_csv(tables: Sequence[Table], width: int | None = None) -> str:
    """Return the tables as they are shown, one after another, separated by commas."""
    del width
    lines = [row for table in tables for row in [table.headers, *([cell.text for cell in row] for row in table.rows)]]
    # the minus sign of typesetting would make a text of a number
    return "".join(csv_line(text.replace("−", "-") for text in line) for line in lines)


FORMATS: dict[str, Callable[..., str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}


def render(tables: Sequence[Table], kind: str, width: int | None = None) -> str:
    """Return tables as `text`, `markdown`, `latex` or `csv`.

    Args:
        tables: to be written.
        kind: a name of `FORMATS`.
        width: of the terminal, for `text`.
    """
    return FORMATS[kind](tables, width)
