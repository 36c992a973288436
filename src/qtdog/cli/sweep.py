"""`qtdog sweep STUDY`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qtdog.sweep.engine import Engine
    from qtdog.sweep.notes import Outcome
    from qtdog.sweep.plan import Plan
    from qtdog.sweep.task import Task

STUDY = "Study file: methods, a grid of targets, seeds and any configuration values."
OUT = "Folder of the run folders. Default: runs/NAME of the study."
DATA = "Where the images are, if not where the study says."
ONLY = "Only runs whose labels or folder contain these words, like 'lsq target=sketch seed=0', and what they need."
LIMIT = "Begin at most so many runs, then stop."
WORKERS = "Runs at a time. Default: one per core, divided by --threads."
THREADS = "Threads of each run. Default: so that all workers together use the cores."
PANEL = "Machines"


def sweep(
    study: Annotated[Path, typer.Argument(help=STUDY, metavar="STUDY")],
    *,
    out: Annotated[Path | None, typer.Option(help=OUT)] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    only: Annotated[str | None, typer.Option(help=ONLY)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help=LIMIT)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help=WORKERS, rich_help_panel=PANEL)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help=THREADS, rich_help_panel=PANEL)] = None,
) -> None:
    """Make all runs of a study that are missing; stopped or killed, the same command goes on.

    Examples:
      qtdog sweep studies/digits.yaml

      qtdog sweep studies/pacs.yaml --data data/pacs --workers 2 --only "lsq target=sketch"

      qtdog sweep status studies/digits.yaml
    """
    from qtdog.cli.sweep_study import open_plan
    from qtdog.sweep.plan import select

    plan, folder = open_plan(study, data, out)
    tasks = select(plan.tasks, only) if only else list(plan.tasks)
    sweep_tasks(plan, tasks, folder, local_engine(plan, folder, workers, threads), limit=limit)


def local_engine(plan: Plan, folder: Path, workers: int | None, threads: int | None) -> Engine:
    """Return the engine of this machine, by default with one worker per core."""
    from qtdog.sweep.local import LocalEngine, default_threads, n_cores

    n_workers = workers or max(1, n_cores() // (threads or 1))
    return LocalEngine(folder, plan.source, workers=n_workers, threads=threads or default_threads(n_workers))


def sweep_tasks(plan: Plan, tasks: Sequence[Task], folder: Path, engine: Engine, *, limit: int | None = None) -> None:
    """Do what is missing of some tasks, show how it goes, and say how it ended.

    Raises:
        ConfigError: a mistake in what is to be done; nothing was started.
        Interrupted, RunError: as in `sweep.driver.Driver.run`, or something failed.
    """
    from qtdog.cli.progress import CountingBar
    from qtdog.cli.sweep_board import make_board
    from qtdog.sweep.check import check_tasks
    from qtdog.sweep.driver import Driver
    from qtdog.sweep.notes import keep_labels
    from qtdog.sweep.state import unfinished

    check_tasks(unfinished(tasks, folder), plan.dataset, CountingBar("decoding images"))
    keep_labels(plan.study.name, plan.labels, folder)
    with make_board(folder) as board:
        progress = Driver(tasks, folder, engine, board, limit=limit).run()
    conclude(plan, progress.failed, progress.blocked(), folder)


def conclude(plan: Plan, failed: dict[str, Outcome], blocked: list[Task], folder: Path) -> None:
    """Say how a sweep ended, and leave with an error if something failed."""
    from qtdog.cli.console import out
    from qtdog.cli.sweep_board import failure_lines
    from qtdog.core.errors import RunError
    from qtdog.sweep.state import unfinished

    left = len(unfinished(plan.tasks, folder))
    out.print(f"{len(plan.tasks) - left} of {len(plan.tasks)} done in {folder}", highlight=False, markup=False)
    if failed:
        lines = failure_lines(plan.tasks, failed, blocked)
        raise RunError("\n".join([f"{len(failed)} failed; the same command tries them again:", *lines]))
