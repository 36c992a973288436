"""`qtdog demo` and `qtdog reproduce`: experiments that come with the program, our runs beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import AS_JSON, Gpus, JsonOutput, Threads, Workers

if TYPE_CHECKING:
    from qtdog.api.studies import PlannedRun
    from qtdog.sweep.plan import Plan
    from qtdog.sweep.results import Line
    from qtdog.sweep.study import Study


TARGETS = ("0", "75")
MEMBERS = 3
SMALL = "small"  # the folder, below the demo's, of the runs that are averaged and rounded
SETTINGS = {"image_size": 12, "batch_size": 8, "lr": 0.01}  # of studies/digits.yaml: 400 steps fit the sources


def demo(
    *,
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write: runs and report.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=10, help="Number of updates of each run.")] = 400,
    as_json: JsonOutput = False,
) -> None:
    """Compare float ERM, the recipe for one small model (7 bits, averaged) and three of them, on angles that none saw.

    Digits rotated by two unseen angles (0° and 75°), one seed: a look at the program, not a measurement of the method.
    The recipe is that of the preset small: 7-bit LSQ with the mean of all weights since the start step. All models of
    an angle share their float steps. What is finished in the output folder is not trained again.

    Example:
      qtdog demo
    """
    from qtdog.cli.console import err, print_json, print_table
    from qtdog.report.tables import cost_table

    results = [result for target in TARGETS for result in run_target(out, target, steps)]
    headers, rows = cost_table(by_method(results))
    page = write_page(out)
    if as_json:
        print_json(results)
    else:
        print_table(headers, rows, title="accuracy (%) on digits at an unseen angle (degrees); one seed")
    err.print(f"report  {page.resolve()}", highlight=False, soft_wrap=True, markup=False)


def run_target(out: Path, target: str, steps: int) -> list[dict[str, Any]]:
    """Return the results of a float run, a 7-bit average and the ensemble of it and two more, for one unseen angle."""
    from dataclasses import replace

    from qtdog.api.experiment import Members, Request, make_plan
    from qtdog.cli.train import join_shown, train_shown

    flags = SETTINGS | {"target": target, "steps": steps}
    small = flags | {"quantizer": "lsq", "bits": 7, "averager": "sma"}
    quantized = Request(small, members=Members(MEMBERS, fork_at="start"), out=out / SMALL, resume=True)
    dataset, members = make_plan(quantized)
    _, (single,) = make_plan(Request(flags | {"quantizer": "none"}, out=out / f"float-{target}", resume=True))
    fork_point = members[0].fork_point
    assert fork_point is not None
    # the float run goes on where the quantized ones begin: its steps until then are theirs
    single = replace(single, fork_point=replace(fork_point, until=fork_point.step))
    first, *_ = train_shown(dataset, members[:1], resume=True)
    results = [*train_shown(dataset, [single], resume=True), first]
    train_shown(dataset, members[1:], resume=True)
    return results + join_shown(dataset, members, out / SMALL)


def by_method(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the results grouped by method, in the order of their first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def write_page(out: Path) -> Path:
    """Write `report.html` from the demo's runs in a folder, which may hold older ones too, and return its path."""
    from qtdog.core.files import write_atomic
    from qtdog.report.html import PageOptions, build_page
    from qtdog.runs.find import find_runs

    page = out / "report.html"
    runs = find_runs([out / SMALL, *(out / f"float-{target}" for target in TARGETS)])
    write_atomic(page, build_page(runs, PageOptions(page, title="Rotated digits")))
    return page


STUDY = "Which table, like table01, or a study file with expected values; leave it out to list the tables."
DATASET = "Which data set of the table, as the paper or 'qtdog data list' calls it."
DATA = "Where the data set lies. Default: as for 'qtdog train --data NAME'."
ONLY = "Only this method of the table; may be given several times."
TRIALS = "Splits and seeds per method and unseen domain. An ensemble has one of each member's instead. Default 3."
DRY_RUN = "Show what is there and what the missing runs would cost; run nothing."
SPEED = "For the estimate: 10¹² operations per second that your device sustains in training. Default 10."
OUT = "Folder of the run folders; what is there already is not run again. Default: runs."
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
    out: Annotated[Path, typer.Option("--output", "-o", help=OUT)] = Path("runs"),
    workers: Workers = None,
    threads: Threads = None,
    gpus: Gpus = None,
    as_json: Annotated[bool, typer.Option("--json", help=AS_JSON)] = False,
) -> None:
    """Run a table of the QT-DoG paper, as far as it is missing, and print our numbers beside the paper's.

    Stopped with Ctrl-C, it goes on where it was when it is called again.

    Examples:
      qtdog reproduce                                               (the tables that there are)

      qtdog reproduce table01 --dataset PACS --dry-run              (what would be run, and what that costs)

      qtdog reproduce table01 --dataset PACS --only ERM --only QT-DoG --trials 1
    """
    from qtdog.api.studies import count_runs, find_study, narrow, planned_runs
    from qtdog.cli.sweep import EngineOptions, drive, make_engine, raise_failed
    from qtdog.core.config_io import parse_assignment
    from qtdog.sweep.results import compare_with_expected, expected_rows, row_lines

    if study is None:
        show_tables(as_json=as_json)
        return
    found, dataset_name = find_study(study, dataset)
    rows = expected_rows(found, only or [])
    wanted = narrow(found, rows, trials, [parse_assignment(text) for text in assign or ()])
    plan = open_study(wanted, data, may_be_missing=dry_run) if wanted.methods else None
    if plan is None:
        runs = count_runs(wanted, rows, trials) if wanted.methods else []
        lines = [line for row in rows for line in row_lines(row, [], 0)]
    else:
        if not dry_run:
            options = EngineOptions(workers=workers, threads=threads, gpus=gpus)
            raise_failed(plan, drive(plan, plan.tasks, out, lambda: make_engine(options, plan, out)))
        lines = compare_with_expected(plan, out, rows, trials)
        runs = planned_runs(plan, out, rows, trials)
    if as_json:
        _print_json(study, dataset_name, lines, runs, speed)
        return
    _show(f"{dataset_name}: {found.about} (%)", lines, changed=bool(assign))
    if dry_run:
        show_cost(runs, speed)


def show_tables(*, as_json: bool) -> None:
    """Print the tables that can be reproduced."""
    from qtdog.api.studies import shipped_studies
    from qtdog.cli.console import print_json, print_table
    from qtdog.sweep.results import expected_rows

    studies = shipped_studies()
    if as_json:
        tables = [
            {"study": name, "dataset": dataset, "title": study.about}
            | {"rows": [asdict(row) for row in expected_rows(study.on_dataset(dataset))]}
            for name, study in studies.items()
            for dataset in study.datasets
        ]
        print_json(tables)
        return
    rows = [[name, ", ".join(study.datasets), study.about] for name, study in studies.items()]
    print_table(["table", "data sets", "what"], rows)


def open_study(study: Study, data: str | None, *, may_be_missing: bool) -> Plan | None:
    """Return the plan of a study, and warn if its data is another; None if it is not here and that does not matter.

    Raises:
        DataError: it is not here, or is malformed.
    """
    from qtdog.cli.console import CountingBar, warn
    from qtdog.core.errors import DataError
    from qtdog.sweep.plan import make_plan

    try:
        plan = make_plan(study, data, CountingBar("reading images"))
    except DataError:
        if may_be_missing and data in (None, study.data):
            return None
        raise
    if plan.dataset.card.name != study.data:
        warn(f"{plan.source} is not {study.data}: ours is not a reproduction of these numbers")
    return plan


def _show(title: str, lines: Sequence[Line], *, changed: bool) -> None:
    from qtdog.cli.console import out, print_table, warn
    from qtdog.sweep.results import HEADERS

    print_table(HEADERS, [line.cells() for line in lines], title=title)
    out.print("ours: mean ± standard error over trials; single models on 80 % of the unseen domain, ensembles on all")
    for method, note in {line.method: line.note for line in lines if line.note}.items():
        out.print(f"{method}: {note}", soft_wrap=True, highlight=False)
    if changed:
        warn("--set changed the setting: ours is not a reproduction of these numbers")


def show_cost(runs: Sequence[PlannedRun], speed: float) -> None:
    """Print the runs and what the missing ones would cost."""
    from qtdog.api.studies import cost_of
    from qtdog.cli.console import out, print_table

    rows: dict[str, list[str]] = {}
    for run in runs:
        data, state = run.config.data, "done" if run.is_done else "missing"
        cells = [run.method, data.target, str(data.trial), state, "–" if run.folder is None else str(run.folder)]
        row = rows.setdefault(run.config.model_dump_json(), cells)
        if run.method not in row[0].split(", "):
            row[0] += f", {run.method}"
    print_table(["method", "unseen", "trial", "", "folder"], list(rows.values()))
    cost = cost_of(runs)
    text = f"{cost.n_runs} of {len(rows)} runs are missing: {cost.n_images:,} images, {cost.flops / 1e15:,.0f} PFLOP"
    out.print(f"{text}, about {cost.hours(speed):,.1f} h at {speed:g} TFLOP/s (--speed)", highlight=False)
    if any(run.folder is None for run in runs):
        out.print("The data is not here: which runs are finished, and the names of their folders, is not known.")


def _print_json(table: str, dataset: str, lines: Sequence[Line], runs: Sequence[PlannedRun], speed: float) -> None:
    from qtdog.api.studies import cost_of
    from qtdog.cli.console import print_json

    cost = cost_of(runs)
    listed = [
        {"method": run.method, "target": run.config.data.target, "trial": run.config.data.trial}
        | {"folder": None if run.folder is None else str(run.folder), "done": run.is_done}
        for run in runs
    ]
    numbers = [asdict(line) | {"difference": line.difference} for line in lines]
    missing = asdict(cost) | {"hours": cost.hours(speed)}
    print_json({"table": table, "dataset": dataset, "lines": numbers, "runs": listed, "missing": missing})
