"""`qtdog table`, `qtdog report` and `qtdog runs`: finished runs as tables, as a page, as a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qtdog.report.render import Table
    from qtdog.runs.find import RunSet
    from qtdog.runs.finished import FinishedRun
    from qtdog.runs.index import IndexRow


RUNS = "Run folders, folders of them, DomainBed's results.jsonl or folders of these."
SELECT = "Only this selection: source, mean, last, oracle or leave-one-out; may be given several times."
SPLIT = "Count the 'whole' unseen domain or DomainBed's '80' % split. Default: 80 if DomainBed's runs are there."
BEST = "One row per method: of several settings in a trial, the best by the selection's own score (DomainBed's search)."
TABLE_COLUMNS = "Which columns beside the first, separated by commas, like 'average,file'. Default: all."
FORMAT = "How the table is written. Default: by the ending of -o, else text."
COMPARE = "Compare two rows, by their names in the table, over the pairs (unseen domain, trial, seed) that both have."
SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv"}


class Format(StrEnum):
    """How a table is written."""

    TEXT = "text"
    MARKDOWN = "markdown"
    LATEX = "latex"
    CSV = "csv"


class Split(StrEnum):
    """Which part of the unseen domain counts."""

    WHOLE = "whole"
    EIGHTY = "80"


def table(
    runs: Annotated[list[Path], typer.Argument(help=RUNS, metavar="RUNS...")],
    *,
    format_: Annotated[Format | None, typer.Option("--format", help=FORMAT)] = None,
    select: Annotated[list[str] | None, typer.Option(help=SELECT)] = None,
    split: Annotated[Split | None, typer.Option(help=SPLIT)] = None,
    best_of_settings: Annotated[bool, typer.Option("--best-of-settings", help=BEST)] = False,
    per_dataset: Annotated[bool, typer.Option("--per-dataset", help="Make a table for each data set.")] = False,
    columns: Annotated[str | None, typer.Option(help=TABLE_COLUMNS)] = None,
    compare: Annotated[tuple[str, str] | None, typer.Option(metavar="A B", help=COMPARE)] = None,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of printing.")] = None,
) -> None:
    """Put finished runs into one table: mean ± standard error over trials, in DomainBed's layout.

    A row per method (and setting), a column per unseen domain, one table for each way to select the checkpoint.

    Examples:
      qtdog table runs/pacs

      qtdog table runs/pacs old/domainbed/results.jsonl --select source -o table.tex

      qtdog table runs/pacs --compare 'erm + float' 'erm + lsq 7 bit'
    """
    from qtdog.cli.console import print_text, terminal_width
    from qtdog.core.errors import ConfigError
    from qtdog.core.files import write_atomic
    from qtdog.runs.find import find_runs
    from qtdog.runs.selection import check_selections

    selections = check_selections(select or ())
    run_set = find_runs(runs)
    options = {"split": choose_split(run_set, None if split is None else split.value), "pooled": best_of_settings}
    kind = format_.value if format_ else SUFFIXES.get(out.suffix if out else "", "text")
    groups = [run_set.of(name) for name in checked_datasets(run_set, per_dataset=per_dataset)]
    if columns is not None and kind == "csv":
        raise ConfigError("--columns is for text, markdown and latex: a CSV file has every number")
    layout = Layout(kind, terminal_width() if out is None else None, _names(columns))
    if compare is not None:
        content = _comparison(groups, compare, selections, layout, **options)
    else:
        content = _tables(groups, selections, layout, **options)
    say_left_out(run_set)
    if out is None:
        print_text(content)
    else:
        write_atomic(out, content)


def choose_split(run_set: RunSet, asked: str | None) -> str:
    """Return the part of the unseen domain that counts: as asked, else DomainBed's where its runs are there."""
    return asked or ("80" if any(run.kind == "domainbed" for run in run_set.runs) else "whole")


def checked_datasets(run_set: RunSet, *, per_dataset: bool) -> list[str]:
    """Return the data sets to make tables of; warns if one name stands for several contents.

    Raises:
        RunError: several, and `per_dataset` was not asked for.
    """
    from qtdog.cli.console import warn
    from qtdog.core.errors import RunError

    names = run_set.datasets
    if len(names) > 1 and not per_dataset:
        counts = ", ".join(f"{name} ({len(run_set.of(name))})" for name in names)
        raise RunError(f"these are runs of several data sets: {counts}. Name fewer, or give --per-dataset")
    for name in names:
        contents = sorted({run.content[:12] for run in run_set.of(name) if run.content})
        if len(contents) > 1:
            warn(f"the runs have {len(contents)} different contents under the name {name}: {', '.join(contents)}")
    return names


def say_left_out(run_set: RunSet) -> None:
    """Say to standard error which runs are not finished or damaged, and how many lines of DomainBed do not count."""
    from qtdog.cli.console import warn

    if run_set.unfinished:
        listed = ", ".join(map(str, run_set.unfinished[:3])) + (" …" if len(run_set.unfinished) > 3 else "")
        warn(f"left out, not finished: {len(run_set.unfinished)} ({listed})")
    for reason, n in run_set.left_out.items():
        warn(f"left out: {n} {reason}")
    for sentence in run_set.damaged:
        warn(f"left out: {sentence}")


@dataclass(frozen=True)
class Layout:
    """How tables are written.

    Attributes:
        kind: a name of `Format`.
        width: characters of a line; None for no end.
        columns: names of those that are shown beside the first; None for all.
    """

    kind: str
    width: int | None
    columns: list[str] | None

    def write(self, tables: Sequence[Table]) -> str:
        """Return tables as text."""
        from qtdog.report.render import render

        kept = tables if self.columns is None else [table.only(self.columns) for table in tables]
        return render(list(kept), self.kind, self.width)


def _names(columns: str | None) -> list[str] | None:
    return None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]


def _tables(
    groups: Sequence[list[FinishedRun]], selections: Sequence[str], layout: Layout, *, split: str, pooled: bool
) -> str:
    from qtdog.core.errors import RunError
    from qtdog.report.tables import numbers_csv, summary_table
    from qtdog.runs.aggregate import aggregate

    made = [aggregate(group, name, split=split, pooled=pooled) for group in groups for name in selections]
    filled = [numbers for numbers in made if numbers.rows]
    if not filled:
        raise RunError(f"no run has an unseen domain that was measured with --select {' '.join(selections)}")
    if layout.kind == "csv":
        return numbers_csv(filled)
    return layout.write([summary_table(one) for one in filled])


def _comparison(
    groups: Sequence[list[FinishedRun]],
    names: tuple[str, str],
    selections: Sequence[str],
    layout: Layout,
    *,
    split: str,
    pooled: bool,
) -> str:
    from qtdog.core.errors import RunError
    from qtdog.report.tables import comparison_table
    from qtdog.runs.aggregate import compare_methods

    tables = []
    for group in groups:
        tried = [compare_methods(group, names, name, split=split, pooled=pooled) for name in selections]
        made = [one for one in tried if one is not None]
        if not made:
            raise RunError(f"'{names[0]}' and '{names[1]}' have no unseen domain, trial and seed in common")
        tables.append(comparison_table(f"{group[0].dataset}: A = {names[0]}, B = {names[1]}", made))
    return layout.write(tables)


REPORT_RUNS = "Run folders, folders of them, DomainBed's results.jsonl; folders with an analysis.json beside or below."
REPORT_SPLIT = "Count the 'whole' unseen domain or DomainBed's '80' % split. Default: 80 if DomainBed's runs are there."
REPORT_BEST = (
    "One row per method: of several settings in a trial, the best by the selection's own score (DomainBed's search)."
)


def report(
    runs: Annotated[list[Path], typer.Argument(help=REPORT_RUNS, metavar="RUNS...")],
    *,
    out: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "qtdog report",
    bench: Annotated[Path | None, typer.Option(help="bench.json of 'qtdog bench', for accuracy over latency.")] = None,
    split: Annotated[Split | None, typer.Option(help=REPORT_SPLIT)] = None,
    best_of_settings: Annotated[bool, typer.Option("--best-of-settings", help=BEST)] = False,
) -> None:
    """Write one page with tables, charts, settings and analyses of finished runs. It needs no network and no server.

    Examples:
      qtdog report runs/pacs -o pacs.html

      qtdog report runs/pacs runs/analyses old/domainbed/results.jsonl --bench bench.json -o pacs.html
    """
    from qtdog.cli.console import err, warn
    from qtdog.core.errors import ConfigError
    from qtdog.core.files import write_atomic
    from qtdog.report.html import PageOptions, build_page
    from qtdog.report.inputs import find_analyses, latencies, read_bench
    from qtdog.runs.find import find_runs

    if out.is_dir():
        raise ConfigError(f"{out} is a folder; -o takes the file to write, like {out / 'report.html'}")
    run_set = find_runs(runs)
    checked_datasets(run_set, per_dataset=True)
    measured = None if bench is None else read_bench(bench)
    if measured is not None and not latencies({"": run_set.runs}, measured):
        warn(f"no file in {bench} lies in the folder of a run, so there is no chart of latencies")
    options = PageOptions(
        out=out,
        title=title,
        split=choose_split(run_set, None if split is None else split.value),
        pooled=best_of_settings,
        analyses=find_analyses(runs, run_set.damaged),
        bench=measured,
    )
    write_atomic(out, build_page(run_set, options))
    say_left_out(run_set)
    err.print(f"report  {out.resolve()}", highlight=False, soft_wrap=True, markup=False)


class RowFormat(StrEnum):
    """How a list of runs is written."""

    TEXT = "text"
    CSV = "csv"
    JSON = "json"


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
    out: Annotated[Path, typer.Option("--runs", help="Folder below which the runs are.")] = Path("runs"),
    columns: Annotated[str, typer.Option(help=COLUMNS, show_default=False)] = SHOWN,
    order: Annotated[str, typer.Option(help="Column to sort by, like 'test_accuracy desc'.")] = "folder",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json: all columns.")] = False,
    format_: Annotated[RowFormat, typer.Option("--format", help="How the rows are written.")] = RowFormat.TEXT,
) -> None:
    """Find runs. The index is a cache of the run folders (RUNS/.sweep/index.sqlite): it may be deleted at any time.

    Examples:
      qtdog runs "objective = 'coral' and bits = 7"

      qtdog runs "study = 'digits' and method in ('float', 'lsq')" --order "test_accuracy desc" --format csv

      qtdog runs "state = 'failed'" --columns method,target,seed,error
    """
    from qtdog.cli.console import print_json, print_text, warn
    from qtdog.core.errors import ConfigError, RunError
    from qtdog.runs.index import ask, refresh

    if as_json and format_ not in (RowFormat.TEXT, RowFormat.JSON):
        raise ConfigError(f"--json or --format {format_.value}, not both")
    as_json = as_json or format_ is RowFormat.JSON
    if not out.is_dir():
        raise RunError(f"{out} is no folder; --runs takes the folder that holds the runs")
    every = as_json or columns.strip() == "all"
    names = [] if every else [name.strip() for name in columns.split(",") if name.strip()]
    index = refresh(out)
    found = ask(index, condition, columns=names, order=order)
    for row in ask(index, "state = 'damaged'", columns=["error"]):
        warn(f"damaged: {row['error']}")
    if as_json:
        print_json(found)
    elif format_ is RowFormat.CSV:
        print_text(csv_text(found, names))
    else:
        _show(found, names)


def csv_text(rows: list[IndexRow], names: list[str]) -> str:
    """Return rows as CSV with a head; a cell that a spreadsheet would run as a formula gets a quote before it."""
    from qtdog.core.safe_text import csv_line

    head = names or (list(rows[0]) if rows else [])
    return "".join(map(csv_line, [head, *(row.values() for row in rows)]))


def _show(rows: list[IndexRow], names: list[str]) -> None:
    from qtdog.cli.console import err, print_table

    headers = names or (list(rows[0]) if rows else [])
    kept = [name for name in headers if _tells(name, rows)]
    if rows:
        shown = [[cell_text(name, row[name]) for name in kept] for row in rows]
        print_table([SHORT.get(name, name) for name in kept], shown)
    err.print(f"{len(rows)} runs", highlight=False, soft_wrap=True)


def _tells(name: str, rows: list[IndexRow]) -> bool:
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
