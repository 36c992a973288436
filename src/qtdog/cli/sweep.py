"""`qtdog sweep STUDY`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtdog.cli.flags import LOG

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qtdog.sweep.engine import Engine
    from qtdog.sweep.notes import Outcome
    from qtdog.sweep.plan import Plan
    from qtdog.sweep.task import Task

STUDY = "Study file: methods, a grid of targets, seeds and any configuration values."
OUT = "Folder of the run folders. Default: runs/NAME of the study."
DATA = "Where the images are, if not where the study says."
ONLY = "Only runs whose labels or folder contain these words, like 'lsq target=sketch seed=0', and what they need."
LIMIT = "Begin at most so many runs, then stop."
WORKERS = "Runs at a time. Default: one per GPU, or where there is none one per core, divided by --threads."
THREADS = "Threads of each run. Default: so that all workers together use the cores."
PANEL = "Machines"
DRY = "Say what would be done and how long it would take; start nothing."
CLUSTER = "With --dry-run: estimate time and cost on so many devices, like 64xH100."
ADDRESS = "Of a Ray cluster: auto, or ray://host:10001. Default: this machine."
GPUS = "GPUs of each run; a fraction shares one. Default: on this machine one if there are any, on a cluster none."
HOURS = "Of each Slurm job; a run that is not finished goes on in a new one."


class EngineName(StrEnum):
    """Who runs the runs."""

    LOCAL = "local"
    RAY = "ray"
    SLURM = "slurm"


def sweep(
    study: Annotated[Path, typer.Argument(help=STUDY, metavar="STUDY")],
    *,
    out: Annotated[Path | None, typer.Option(help=OUT)] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    only: Annotated[str | None, typer.Option(help=ONLY)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help=LIMIT)] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help=DRY)] = False,
    cluster: Annotated[str | None, typer.Option(metavar="NxDEVICE", help=CLUSTER)] = None,
    log: Annotated[list[str] | None, typer.Option(metavar="LOGGER", help=LOG)] = None,
    engine: Annotated[EngineName, typer.Option(help="Who runs the runs.", rich_help_panel=PANEL)] = EngineName.LOCAL,
    workers: Annotated[int | None, typer.Option(min=1, help=WORKERS, rich_help_panel=PANEL)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help=THREADS, rich_help_panel=PANEL)] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help=GPUS, rich_help_panel=PANEL)] = None,
    address: Annotated[str | None, typer.Option(help=ADDRESS, rich_help_panel=PANEL)] = None,
    partition: Annotated[str, typer.Option(help="Of Slurm.", rich_help_panel=PANEL)] = "",
    hours: Annotated[float, typer.Option(min=0.1, help=HOURS, rich_help_panel=PANEL)] = 4.0,
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
    tasks = select(plan.tasks, only) if only else list(plan.tasks)
    if dry:
        dry_run(plan, tasks, folder, cluster=cluster, workers=machines.crew.workers)
        show_batch_script(machines, folder)
        return
    sweep_tasks(plan, tasks, folder, lambda: make_engine(machines, plan, folder), limit=limit)


def sweep_tasks(
    plan: Plan, tasks: Sequence[Task], folder: Path, engine: Callable[[], Engine], *, limit: int | None = None
) -> None:
    """Do what is missing of some tasks, show how it goes, and say how it ended.

    Raises:
        ConfigError: a mistake in what is to be done; nothing was started.
        Interrupted, RunError: as in `sweep.driver.Driver.run`, or something failed.
    """
    from qtdog.cli.progress import CountingBar
    from qtdog.cli.sweep_board import make_board
    from qtdog.cli.train import warn_skipped
    from qtdog.sweep.check import check_tasks
    from qtdog.sweep.driver import Driver
    from qtdog.sweep.notes import keep_labels
    from qtdog.sweep.state import unfinished

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
    from qtdog.sweep.state import unfinished

    left = len(unfinished(plan.tasks, folder))
    out.print(f"{len(plan.tasks) - left} of {len(plan.tasks)} done in {folder}", highlight=False, markup=False)
    if failed:
        lines = failure_lines(plan.tasks, failed, blocked)
        raise RunError("\n".join([f"{len(failed)} failed; the same command tries them again:", *lines]))
