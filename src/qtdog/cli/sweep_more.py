"""`qtdog sweep status | retry | table | diff | merge`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtdog.cli.sweep_flags import (
    Address,
    DataFolder,
    EngineChoice,
    EngineName,
    Gpus,
    Hours,
    Log,
    Only,
    OutFolder,
    Partition,
    StudyFile,
    Threads,
    Workers,
)

if TYPE_CHECKING:
    from qtdog.sweep.diff import Difference
    from qtdog.sweep.journal import Outcome
    from qtdog.sweep.plan import Task

AS_JSON = "Print JSON."
FRESH = "Throw the failed runs' folders away first, instead of going on from their last checkpoint."


def status(
    study: StudyFile,
    *,
    out: OutFolder = None,
    data: DataFolder = None,
    every: Annotated[bool, typer.Option("--all", help="A line for each run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=AS_JSON)] = False,
) -> None:
    """Show what is done, running, failed (and why) and missing. Nothing is changed.

    Example:
      qtdog sweep status studies/digits.yaml
    """
    from qtdog.cli.console import print_json
    from qtdog.cli.sweep_study import open_plan
    from qtdog.sweep.journal import read_failures
    from qtdog.sweep.runner import standings

    plan, folder = open_plan(study, data, out)
    found = standings(plan.tasks, folder)
    failures = {name: why for name, why in read_failures(folder).items() if found.get(name) == "failed"}
    if as_json:
        tasks = [
            {"folder": task.name, "kind": task.kind, "labels": list(task.labels), "state": found[task.name]}
            | ({"reason": failures[task.name].reason} if task.name in failures else {})
            for task in plan.tasks
        ]
        print_json({"out": str(folder), "counts": Counter(found.values()), "tasks": tasks})
        return
    _show_status(plan.tasks, found, failures, folder, every=every)


def _show_status(
    tasks: Sequence[Task], found: dict[str, str], failures: dict[str, Outcome], folder: Path, *, every: bool
) -> None:
    from qtdog.cli.console import out, print_table
    from qtdog.cli.sweep_board import failure_lines, name_of, time_text
    from qtdog.sweep.estimate import Pace
    from qtdog.sweep.runner import STATES, unfinished

    if every:
        print_table(["run", "state", "folder"], [[name_of(task), found[task.name], task.name] for task in tasks])
    counts: dict[str, Counter[str]] = {}
    for task in tasks:
        name = str(task.labels[0]["method"]) if task.labels else "shared steps"
        counts.setdefault(name, Counter())[found[task.name]] += 1
    rows = [[name, *(str(count[state] or "") for state in STATES)] for name, count in counts.items()]
    total = Counter(found[task.name] for task in tasks)
    print_table(["method", *STATES], [*rows, ["all", *(str(total[state] or "") for state in STATES)]])
    for line in failure_lines(tasks, failures, []):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    left = Pace(tasks, folder).left_s(unfinished(tasks, folder), [])
    if left:
        out.print(f"About {time_text(left)} of one worker left, by the runs that are done.", highlight=False)


def retry(
    study: StudyFile,
    *,
    out: OutFolder = None,
    data: DataFolder = None,
    only: Only = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=FRESH)] = False,
    log: Log = None,
    engine: EngineChoice = EngineName.LOCAL,
    workers: Workers = None,
    threads: Threads = None,
    gpus: Gpus = None,
    address: Address = None,
    partition: Partition = "",
    hours: Hours = 4.0,
) -> None:
    """Try just the runs again that failed (`qtdog sweep STUDY` does so too, beside what is missing).

    Example:
      qtdog sweep retry studies/digits.yaml --fresh
    """
    import shutil

    from qtdog.cli.console import out as console
    from qtdog.cli.sweep import sweep_tasks
    from qtdog.cli.sweep_engines import Machines, make_engine
    from qtdog.cli.sweep_study import open_plan
    from qtdog.sweep.journal import read_failures
    from qtdog.sweep.plan import select, with_needs

    machines = Machines(engine.value, workers, threads, gpus, address, partition, hours, tuple(log or ()))
    machines.check()
    plan, folder = open_plan(study, data, out)
    failed = set(read_failures(folder))
    tasks = [task for task in (select(plan.tasks, only) if only else plan.tasks) if task.name in failed]
    if not tasks:
        console.print("nothing failed")
        return
    if fresh:
        for task in tasks:
            shutil.rmtree(task.folder(folder), ignore_errors=True)
    wanted = machines.shared(with_needs(plan.tasks, tasks))
    sweep_tasks(plan, wanted, folder, lambda: make_engine(machines, plan, folder))


def diff(
    first: Annotated[Path, typer.Argument(help="Study file, or folder of run folders.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Study file, or folder of run folders.", metavar="B")],
    *,
    data: DataFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help=AS_JSON)] = False,
) -> None:
    """Show which runs two studies (or a study and a folder) do not have in common, and which values differ.

    Examples:
      qtdog sweep diff studies/digits.yaml studies/pacs.yaml

      qtdog sweep diff studies/digits.yaml runs/digits
    """
    from dataclasses import asdict

    from qtdog.cli.console import print_json
    from qtdog.cli.sweep_study import open_plan
    from qtdog.sweep.diff import diff as compare
    from qtdog.sweep.diff import of_folder, of_plan

    sides = [of_folder(side) if side.is_dir() else of_plan(open_plan(side, data, None)[0]) for side in (first, second)]
    found = compare(*sides)
    if as_json:
        changed = [{"runs": n, "values": list(lines)} for lines, n in found.changed.items()]
        print_json(asdict(found) | {"changed": changed})
    else:
        _show_difference(found)


def _show_difference(found: Difference) -> None:
    from qtdog.cli.console import out

    out.print(f"{found.common} runs in both", highlight=False)
    for lines, n in list(found.changed.items())[:20]:
        out.print(f"{n} differ in {', '.join(lines)}", highlight=False, markup=False, soft_wrap=True)
    for side, names in (("the first", found.only_first), ("the second", found.only_second)):
        if names:
            listed = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
            out.print(f"{len(names)} only in {side}: {listed}", highlight=False, markup=False, soft_wrap=True)


def merge(
    sources: Annotated[list[Path], typer.Argument(help="Folders of run folders, from other machines.", metavar="FROM")],
    *,
    into: Annotated[Path, typer.Option(help="The folder that shall have them all.")],
) -> None:
    """Copy the runs that are missing in a folder, or came farther elsewhere. The sources are not changed.

    Example:
      qtdog sweep merge /mnt/other/runs/digits --into runs/digits
    """
    from qtdog.cli.console import out
    from qtdog.core.errors import RunError
    from qtdog.sweep.merge import merge as bring_together

    found = bring_together(sources, into)
    counts = f"{len(found.copied)} copied, {len(found.kept)} were there, {len(found.busy)} in use and left alone"
    out.print(counts, highlight=False)
    if found.conflicts:
        listed = ", ".join(found.conflicts[:10])
        raise RunError(
            f"{len(found.conflicts)} runs are finished in both places with different files; those in {into} stayed: "
            f"{listed}. Runs on other processors or versions of PyTorch may differ in the last bits"
        )
