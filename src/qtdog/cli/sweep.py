"""`qtdog sweep STUDY`."""

from __future__ import annotations

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
    from collections.abc import Callable, Sequence

    from qtdog.sweep.journal import Outcome
    from qtdog.sweep.plan import Plan, Task
    from qtdog.sweep.runner import Engine

LIMIT = "Begin at most so many runs, then stop."
DRY = "Say what would be done and how long it would take; start nothing."
CLUSTER = "With --dry-run: estimate time and cost on so many devices, like 64xH100."


def sweep(
    study: StudyFile,
    *,
    out: OutFolder = None,
    data: DataFolder = None,
    only: Only = None,
    limit: Annotated[int | None, typer.Option(min=1, help=LIMIT)] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help=DRY)] = False,
    cluster: Annotated[str | None, typer.Option(metavar="NxDEVICE", help=CLUSTER)] = None,
    log: Log = None,
    engine: EngineChoice = EngineName.LOCAL,
    workers: Workers = None,
    threads: Threads = None,
    gpus: Gpus = None,
    address: Address = None,
    partition: Partition = "",
    hours: Hours = 4.0,
) -> None:
    """Make all runs of a study that are missing; stopped or killed, the same command goes on.

    Examples:
      qtdog sweep studies/digits.yaml

      qtdog sweep studies/pacs.yaml --data data/pacs --workers 2 --only "lsq target=sketch"

      qtdog sweep studies/pacs.yaml --data data/pacs --dry-run --cluster 64xH100

      qtdog sweep status studies/digits.yaml
    """
    from qtdog.cli.sweep_dry import dry_run
    from qtdog.cli.sweep_engines import Machines, make_engine, show_batch_script
    from qtdog.cli.sweep_study import open_plan
    from qtdog.core.errors import ConfigError
    from qtdog.sweep.plan import select

    if cluster and not dry:
        raise ConfigError("--cluster is for --dry-run; a real cluster is reached with --engine ray or slurm")
    machines = Machines(engine.value, workers, threads, gpus, address, partition, hours, tuple(log or ()))
    machines.check()
    plan, folder = open_plan(study, data, out)
    tasks = machines.shared(select(plan.tasks, only) if only else plan.tasks)
    if dry:
        dry_run(plan, tasks, folder, cluster=cluster, crew=machines.crew)
        show_batch_script(machines, folder)
        return
    sweep_tasks(plan, tasks, folder, lambda: make_engine(machines, plan, folder), limit=limit)


def sweep_tasks(
    plan: Plan, tasks: Sequence[Task], folder: Path, engine: Callable[[], Engine], *, limit: int | None = None
) -> None:
    """Do what is missing of some tasks, show how it goes, and say how it ended.

    Raises:
        ConfigError: a mistake in what is to be done; nothing was started.
        Interrupted, RunError: as in `sweep.runner.Driver.run`, or something failed.
    """
    from qtdog.cli.progress import CountingBar
    from qtdog.cli.sweep_board import make_board
    from qtdog.cli.train import warn_skipped
    from qtdog.sweep.journal import keep_labels
    from qtdog.sweep.runner import Driver, check_tasks, unfinished

    warn_skipped(plan.dataset)
    check_tasks(unfinished(tasks, folder), plan.dataset, CountingBar("decoding images"))
    keep_labels(plan.study.name, plan.labels, folder)
    with make_board(folder) as board:
        progress = Driver(tasks, folder, engine(), board, limit=limit).run()
    conclude(plan, progress.failed, progress.blocked(), folder)


def conclude(plan: Plan, failed: dict[str, Outcome], blocked: list[Task], folder: Path) -> None:
    """Say how a sweep ended, and leave with an error if something failed."""
    from qtdog.cli.console import out
    from qtdog.cli.sweep_board import failure_lines
    from qtdog.core.errors import RunError
    from qtdog.sweep.runner import unfinished

    left = len(unfinished(plan.tasks, folder))
    out.print(f"{len(plan.tasks) - left} of {len(plan.tasks)} done in {folder}", highlight=False, markup=False)
    if failed:
        lines = failure_lines(plan.tasks, failed, blocked)
        raise RunError("\n".join([f"{len(failed)} failed; the same command tries them again:", *lines]))
