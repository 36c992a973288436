"""`qtdog runs`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qtdog.sweep.index import Row

CONDITION = "SQL expression over the columns, like \"objective = 'coral' and bits = 7\". Default: all runs."
AXES = ("objective", "averager", "quantizer")
SHOWN = (
    "method,objective,averager,quantizer,bits,target,seed,source_accuracy,test_accuracy,mean_after_start,state,folder"
)
SHORT = {"source_accuracy": "source", "test_accuracy": "unseen", "mean_after_start": "after start"}
COLUMNS = "Which columns, separated by commas; 'all' for every one. Accuracies are fractions."


def runs(
    condition: Annotated[str, typer.Argument(help=CONDITION)] = "",
    *,
    out: Annotated[Path, typer.Option(help="Folder below which the runs are.")] = Path("runs"),
    columns: Annotated[str, typer.Option(help=COLUMNS, show_default=False)] = SHOWN,
    order: Annotated[str, typer.Option(help="Column to sort by, like 'test_accuracy desc'.")] = "folder",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, all columns.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Find runs. The index is a cache of the run folders (<OUT>/.sweep/index.sqlite): it may be deleted at any time.

    Examples:
      qtdog runs "objective = 'coral' and bits = 7"

      qtdog runs "study = 'digits' and method in ('float', 'lsq')" --order "test_accuracy desc" --csv

      qtdog runs "state = 'failed'" --columns method,target,seed,error
    """
    from qtdog.cli.console import print_json
    from qtdog.core.errors import ConfigError, RunError
    from qtdog.sweep.index import ask, refresh

    if as_json and as_csv:
        raise ConfigError("--json or --csv, not both")
    if not out.is_dir():
        raise RunError(f"{out} is no folder; --out takes the folder that holds the runs")
    every = as_json or columns.strip() == "all"
    names = [] if every else [name.strip() for name in columns.split(",") if name.strip()]
    found = ask(refresh(out), condition, columns=names, order=order)
    if as_json:
        print_json(found)
    elif as_csv:
        typer.echo(csv_text(found, names), nl=False)
    else:
        _show(found, names)


def csv_text(rows: list[Row], names: list[str]) -> str:
    """Return rows as CSV with a head; a cell that a spreadsheet would run as a formula gets a quote before it."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names or (list(rows[0]) if rows else []))
    for row in rows:
        writer.writerow([_harmless(value) for value in row.values()])
    return stream.getvalue()


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def _show(rows: list[Row], names: list[str]) -> None:
    from qtdog.cli.console import err, print_table

    headers = names or (list(rows[0]) if rows else [])
    kept = [name for name in headers if _tells(name, rows)]
    if rows:
        shown = [[cell_text(name, row[name]) for name in kept] for row in rows]
        print_table([SHORT.get(name, name) for name in kept], shown)
    err.print(f"{len(rows)} runs", highlight=False)


def _tells(name: str, rows: list[Row]) -> bool:
    """Return whether a column says something: an axis does not where all have it alike, or a method names it."""
    values = {row[name] for row in rows}
    named = all(row.get("method") for row in rows)
    return values != {None} and (name not in AXES or (len(values) > 1 and not named))


def cell_text(name: str, value: object) -> str:
    """Return a value for people: accuracies in percent.

    Example:
        >>> cell_text("test_accuracy", 0.876), cell_text("bits", None), cell_text("lr", 0.0004)
        ('87.6', '', '0.0004')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        percent = name.endswith("_accuracy") or name.endswith("_after_start")
        return f"{100 * value:.1f}" if percent else f"{value:g}"
    return str(value)
