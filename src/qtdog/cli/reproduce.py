"""`qtdog reproduce`: the tables of the paper, our runs beside its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qtdog.api.paper import Job, Line, Question
    from qtdog.data.dataset import DomainDataset

STUDY = "Which table, like table01; leave it out to list them."
DATASET = "Which data set of the table, as the paper or 'qtdog data list' calls it."
DATA = "Where the data set lies. Default: as for 'qtdog train --data NAME'."
ONLY = "Only this method of the table; may be given several times."
TRIALS = "Splits and seeds per method and unseen domain. An ensemble has one of each member's instead."
DRY_RUN = "Show what is there and what the missing runs would cost; run nothing."
SPEED = "For the estimate: 10¹² operations per second that your device sustains in training."
OUT = "Folder of the run folders; what is there already is not run again."
SET = "Change the setting, for example to try it out; it is then not the paper's."


def reproduce(
    study: Annotated[str | None, typer.Argument(help=STUDY, metavar="[TABLE]")] = None,
    *,
    dataset: Annotated[str | None, typer.Option(help=DATASET)] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="METHOD", help=ONLY)] = None,
    trials: Annotated[int, typer.Option(min=1, max=100, help=TRIALS)] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False,
    speed: Annotated[float, typer.Option(min=0.001, metavar="TFLOPS", help=SPEED)] = 10.0,
    assign: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help=SET)] = None,
    out: Annotated[Path, typer.Option(help=OUT)] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a table of the QT-DoG paper, as far as it is missing, and print our numbers beside the paper's.

    Stopped with Ctrl-C, it goes on where it was when it is called again.

    Examples:
      qtdog reproduce                                               (the tables that there are)

      qtdog reproduce table01 --dataset PACS --dry-run              (what would be run, and what that costs)

      qtdog reproduce table01 --dataset PACS --only ERM --only QT-DoG --trials 1
    """
    from qtdog.api.paper import Question, choose_rows, find_table, measure
    from qtdog.cli.console import warn
    from qtdog.core.config_io import parse_assignment

    if study is None:
        show_tables(as_json=as_json)
        return
    table = find_table(study, dataset)
    changes = [parse_assignment(text) for text in assign or ()]
    if data is not None:
        changes.append({"data": {"source": data}})
    question = Question(table, list(choose_rows(table, only or [])), trials, out, changes)
    found = open_data(question, may_be_missing=dry_run)
    if not dry_run:
        run_missing(question, found)
    lines, jobs = measure(question, found, make=not dry_run, warn=warn)
    if as_json:
        _print_json(question, lines, jobs, speed)
        return
    _show(question, lines, changed=bool(assign))
    if dry_run:
        show_cost(jobs, speed, found)


def show_tables(*, as_json: bool) -> None:
    """Print the tables that can be reproduced."""
    from qtdog.api.paper import paper_tables
    from qtdog.cli.console import print_json, print_table

    tables = paper_tables()
    if as_json:
        print_json([table.model_dump() for table in tables])
        return
    studies = {table.study: table for table in tables}
    rows = []
    for study, one in studies.items():
        datasets = [table.dataset for table in tables if table.study == study]
        rows.append([study, ", ".join(datasets), one.title])
    print_table(["table", "data sets", "what"], rows)


def open_data(question: Question, *, may_be_missing: bool) -> DomainDataset | None:
    """Return the data set of a table, and warn if it is another; None if it is not here and that does not matter.

    Raises:
        DataError: it is not here, or is malformed.
    """
    from qtdog.cli.console import CountingBar, warn
    from qtdog.core.config_io import load_preset
    from qtdog.core.errors import DataError
    from qtdog.data.open import open_readable

    asked, meant = question.config(question.rows[0]).data, load_preset(question.table.preset)["data"]["source"]
    source = asked.source
    try:
        found = open_readable(source, skip_unreadable=asked.skip_unreadable, progress=CountingBar("reading images"))
    except DataError:
        if may_be_missing and source == meant:
            return None
        raise
    if found.card.name != meant:
        warn(f"{source} is not {meant}: ours is not a reproduction of these numbers")
    return found


def run_missing(question: Question, dataset: DomainDataset | None) -> None:
    """Make the runs that are missing, one after another.

    Raises:
        Interrupted: a signal asked to stop; everything so far is kept.
    """
    from qtdog.api.experiment import Planned
    from qtdog.api.paper import plan_jobs
    from qtdog.cli.console import err
    from qtdog.cli.train import train_shown

    missing = {job.folder.path: job for job in plan_jobs(question, dataset) if job.result is None}
    for place, job in enumerate(missing.values(), start=1):
        config = job.config
        text = f"{place} of {len(missing)}: {job.row.method}, unseen {config.data.target}, trial {config.data.trial}"
        err.print(text, highlight=False, markup=False, soft_wrap=True)
        train_shown(dataset, [Planned(config, job.folder)], resume=True)


def _show(question: Question, lines: Sequence[Line], *, changed: bool) -> None:
    from qtdog.api.paper import HEADERS
    from qtdog.cli.console import out, print_table, warn

    table = question.table
    print_table(HEADERS, [line.cells() for line in lines], title=f"{table.dataset}: {table.title} (%)")
    out.print("ours: mean ± standard error over trials; single models on 80 % of the unseen domain, ensembles on all")
    for method, note in {line.method: line.note for line in lines if line.note}.items():
        out.print(f"{method}: {note}", soft_wrap=True, highlight=False)
    if changed:
        warn("--set changed the setting: ours is not a reproduction of these numbers")


def show_cost(jobs: Sequence[Job], speed: float, dataset: DomainDataset | None) -> None:
    """Print the runs and what the missing ones would cost."""
    from qtdog.api.paper import cost_of
    from qtdog.cli.console import out, print_table

    rows: dict[Path, list[str]] = {}
    for job in jobs:
        data, state = job.config.data, "missing" if job.result is None else "done"
        folder = str(job.folder.path) if dataset is not None else "–"
        row = rows.setdefault(job.folder.path, [job.row.method, data.target, str(data.trial), state, folder])
        if job.row.method not in row[0].split(", "):
            row[0] += f", {job.row.method}"
    print_table(["method", "unseen", "trial", "", "folder"], list(rows.values()))
    cost = cost_of(jobs)
    text = f"{cost.n_runs} of {len(rows)} runs are missing: {cost.n_images:,} images, {cost.flops / 1e15:,.0f} PFLOP"
    out.print(f"{text}, about {cost.hours(speed):,.1f} h at {speed:g} TFLOP/s (--speed)", highlight=False)
    if dataset is None:
        out.print("The data is not here: which runs are finished, and the names of their folders, is not known.")


def _print_json(question: Question, lines: Sequence[Line], jobs: Sequence[Job], speed: float) -> None:
    from qtdog.api.paper import cost_of
    from qtdog.cli.console import print_json

    cost = cost_of(jobs)
    runs = [
        {"method": job.row.method, "target": job.config.data.target, "trial": job.config.data.trial}
        | {"folder": str(job.folder.path), "done": job.result is not None}
        for job in jobs
    ]
    told = {"table": question.table.study, "dataset": question.table.dataset}
    found = [asdict(line) | {"difference": line.difference} for line in lines]
    print_json(told | {"lines": found, "runs": runs, "missing": asdict(cost) | {"hours": cost.hours(speed)}})
