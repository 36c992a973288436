"""Where the commands write: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Of several processes (`accelerate launch`) only the first one speaks, but each may fail.
RANK = os.environ.get("RANK", "0")
SPEAKS = RANK == "0"

out = Console(quiet=not SPEAKS)
err = Console(stderr=True, quiet=not SPEAKS)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    err.print(f"[yellow]warning:[/] {escape(text)}", highlight=False)


def fail(text: str) -> None:
    """Print an error to standard error, of whichever process."""
    where = "" if SPEAKS else f" (process {RANK})"
    console = Console(stderr=True)
    console.print(f"[bold red]error{where}:[/] {escape(text)}", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document, for programs."""
    if SPEAKS:
        typer.echo(json.dumps(value, indent=1))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table, numbers to the right; names from files are shown as they are, never read as markup."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, header in enumerate(headers):
        numbers = i > 0 and all(row[i][:1] in "–-0123456789" for row in rows)  # an empty cell is none of them, and fits
        table.add_column(escape(header), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)
