"""`qtdog table`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qtdog.runs.entry import Entry
    from qtdog.runs.find import Found

RUNS = "Run folders, folders of them, DomainBed's results.jsonl or folders of these."
SELECT = "Only this way to choose a checkpoint: source, mean, last or oracle; may be given several times."
SPLIT = "Count the 'whole' unseen domain or DomainBed's '80' % split. Default: 80 if DomainBed's runs are there."
BEST = "One row per method: of several settings in a trial, the best by the selection's own score (DomainBed's search)."
COMPARE = "Compare two rows, by their names in the table, over the pairs (unseen domain, trial) that both have."
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
    format_: Annotated[Format | None, typer.Option("--format", help="Default: by the ending of -o, else text.")] = None,
    select: Annotated[list[str] | None, typer.Option(help=SELECT)] = None,
    split: Annotated[Split | None, typer.Option(help=SPLIT)] = None,
    best_of_settings: Annotated[bool, typer.Option("--best-of-settings", help=BEST)] = False,
    per_dataset: Annotated[bool, typer.Option("--per-dataset", help="A table for each of several data sets.")] = False,
    compare: Annotated[tuple[str, str] | None, typer.Option(metavar="A B", help=COMPARE)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write instead of printing.")] = None,
) -> None:
    """Put finished runs into one table: mean ± standard error over trials, in DomainBed's layout.

    A row per method (and setting), a column per unseen domain, a block for each way to choose the checkpoint.

    Examples:
      qtdog table runs/pacs

      qtdog table runs/pacs old/domainbed/results.jsonl --select source -o table.tex

      qtdog table runs/pacs --compare 'erm + float' 'erm + lsq 7 bit'
    """
    from qtdog.core.files import write_atomic
    from qtdog.runs.find import find
    from qtdog.runs.selection import check_selections

    selections = check_selections(select or ())
    found = find(runs)
    split_name = choose_split(found, None if split is None else split.value)
    kind = format_.value if format_ else SUFFIXES.get(out.suffix if out else "", "text")
    groups = [found.of(name) for name in checked_datasets(found, per_dataset=per_dataset)]
    how = {"split": split_name, "pooled": best_of_settings}
    if compare is not None:
        content = _comparison(groups, compare, selections, kind, **how)
    else:
        content = _tables(groups, selections, kind, **how)
    say_left_out(found)
    if out is None:
        typer.echo(content, nl=False)
    else:
        write_atomic(out, content)


def choose_split(found: Found, asked: str | None) -> str:
    """Return the part of the unseen domain that counts: as asked, else DomainBed's where its runs are there."""
    return asked or ("80" if any(entry.kind == "domainbed" for entry in found.entries) else "whole")


def checked_datasets(found: Found, *, per_dataset: bool) -> list[str]:
    """Return the data sets to make tables of; warns if one name stands for several contents.

    Raises:
        RunError: several, and `per_dataset` was not asked for.
    """
    from qtdog.cli.console import warn
    from qtdog.core.errors import RunError

    names = found.datasets
    if len(names) > 1 and not per_dataset:
        counts = ", ".join(f"{name} ({len(found.of(name))})" for name in names)
        raise RunError(f"these are runs of several data sets: {counts}. Name fewer, or give --per-dataset")
    for name in names:
        contents = sorted({entry.content[:12] for entry in found.of(name) if entry.content})
        if len(contents) > 1:
            warn(f"the runs have {len(contents)} different contents under the name {name}: {', '.join(contents)}")
    return names


def say_left_out(found: Found) -> None:
    """Say to standard error which runs are not finished."""
    from qtdog.cli.console import warn

    if found.unfinished:
        listed = ", ".join(str(path) for path in found.unfinished[:3]) + (" …" if len(found.unfinished) > 3 else "")
        warn(f"left out, not finished: {len(found.unfinished)} ({listed})")


def _tables(groups: Sequence[list[Entry]], selections: Sequence[str], kind: str, *, split: str, pooled: bool) -> str:
    from qtdog.core.errors import RunError
    from qtdog.report.tables import make_block
    from qtdog.report.text_tables import render

    blocks = [make_block(group, name, split=split, pooled=pooled) for group in groups for name in selections]
    filled = [block for block in blocks if block.rows]
    if not filled:
        raise RunError(f"no run has an unseen domain that was measured with --select {' '.join(selections)}")
    return render(filled, kind)


def _comparison(
    groups: Sequence[list[Entry]],
    names: tuple[str, str],
    selections: Sequence[str],
    kind: str,
    *,
    split: str,
    pooled: bool,
) -> str:
    from qtdog.core.errors import RunError
    from qtdog.report.compare import compare, comparison_sheet
    from qtdog.report.text_tables import SHEETS

    sheets = []
    for group in groups:
        tried = [compare(group, names, name, split=split, pooled=pooled) for name in selections]
        found = [one for one in tried if one is not None]
        if not found:
            raise RunError(f"'{names[0]}' and '{names[1]}' have no unseen domain and trial in common")
        sheets.append(comparison_sheet(f"{group[0].dataset}: A = {names[0]}, B = {names[1]}", found))
    return SHEETS[kind](sheets)
