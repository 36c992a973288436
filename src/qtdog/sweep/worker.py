"""Do one task of a sweep in this process."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qtdog.core.errors import FolderInUseError, Interrupted, QtdogError
from qtdog.core.printable import printable
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_any, without_unreadable
from qtdog.ensemble.assemble import EnsembleSpec, assemble, finished
from qtdog.ensemble.members import read_member, share_splits
from qtdog.ensemble.scoring import open_evaluation_set
from qtdog.ensemble.teacher import load_teacher
from qtdog.ensemble.weight_averaging import Recipe
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import Outcome, Status
from qtdog.sweep.plan import Task
from qtdog.training.checkpoint import Checkpoint, read_checkpoint
from qtdog.training.loggers import with_loggers
from qtdog.training.plugins import place_in_plugin
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.shared_updates import SharedRun

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def run_task(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> Outcome:
    """Do a task, or go on with it, and return how it ended; never raises an Exception.

    Args:
        task: what to do; what it needs is done.
        out: the sweep's folder.
        dataset: the data that the task's configuration names, whole: `data.skip_unreadable` is done here.
        callbacks: receives the progress, numbers and warnings of the run.
    """
    started = time.perf_counter()
    try:
        task.load_plugins()
        if _skips_unreadable(task, out):
            dataset = without_unreadable(dataset, callbacks.progress)
        trained_s = _WORK[task.kind](task, out, dataset, callbacks)
        return Outcome(task.name, "done", seconds=_since(started), trained_s=trained_s)
    except Exception as error:
        return failure(task, error, _since(started))


def failure(task: Task, error: Exception, seconds: float) -> Outcome:
    """Return the outcome of a task that ended with an error; print the traceback of one that is not the user's."""
    if not isinstance(error, QtdogError):
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            traceback.print_exc()
    status: Status = "disk" if is_disk_error(error) else "failed"
    if isinstance(error, FolderInUseError):
        status = "busy"
    elif isinstance(error, Interrupted):
        status = "stopped"
    reason = str(error) or type(error).__name__
    if place := place_in_plugin(error):
        reason = f"{place}: {type(error).__name__}: {reason}"
    return Outcome(task.name, status, reason[:1000], type(error).__name__, seconds=seconds)


def quiet_callbacks(loggers: Sequence[str], folder: Path) -> RunCallbacks:
    """Return callbacks that print warnings to standard error and send numbers to the loggers.

    Raises:
        ConfigError: an unknown logger.
    """
    return RunCallbacks(
        with_loggers(loggers, folder), warn=lambda text: print(printable(text), file=sys.stderr, flush=True)
    )


def is_disk_error(error: BaseException) -> bool:
    """Return whether an error, or what caused it, is that the disk is full or cannot be written."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK:
            return True
        cause = cause.__cause__
    return "No space left" in str(error)


def _skips_unreadable(task: Task, out: Path) -> bool:
    """Return whether a task's own configuration, or that of an ensemble's members, leaves out unreadable images."""
    config = task.config if task.ensemble is None else RunFolder(out / task.ensemble.members[0]).read_config()
    return config is not None and config.data.skip_unreadable


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _run(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.config is not None
    folder = RunFolder(task.folder(out))
    start = _checkpoint(task, out, callbacks)
    teacher = load_teacher(task.config, dataset)
    shared_runs = [SharedRun(config, RunFolder(out / name)) for name, config in task.shared_runs]
    result = run(
        task.config,
        dataset,
        folder,
        resume=True,
        callbacks=callbacks,
        fork_from=start,
        teacher=teacher,
        shared_runs=shared_runs,
    )
    return float(result["trained_s"])


def _checkpoint(task: Task, out: Path, callbacks: RunCallbacks) -> Checkpoint | None:
    """Return the checkpoint that a run starts from; None for step 0, also if it is gone: the result is the same."""
    path = RunFolder(out / task.fork_from).checkpoints / f"step-{task.step:08d}"
    if not task.fork_from or not path.is_dir():
        return None
    try:
        return read_checkpoint(path)
    except QtdogError as error:
        callbacks.warn(f"{error}; training from step 0 instead")
        return None


def _fork_point(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.config is not None
    made = train_fork_point(task.config, dataset, RunFolder(task.folder(out)), until=task.step, callbacks=callbacks)
    return float(made.state.get("trained_s", 0.0))


def _ensemble(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.ensemble is not None
    folder = RunFolder(task.folder(out))
    spec = EnsembleSpec(task.ensemble.kind, folder.model_file, Recipe(pick=task.ensemble.pick))
    members = [read_member(out / name) for name in task.ensemble.members]
    with folder.lock():
        if finished(members, spec) is None:
            evaluation_set = open_evaluation_set(
                members[0].config, dataset, same_splits=share_splits(members), progress=callbacks.progress
            )
            assemble(members, spec, evaluation_set, warn=callbacks.warn)
    return 0.0


_WORK: dict[str, Callable[[Task, Path, DomainDataset, RunCallbacks], Any]] = {
    "run": _run,
    "fork_point": _fork_point,
    "ensemble": _ensemble,
}


@lru_cache(maxsize=2)
def open_study_dataset(source: str) -> DomainDataset:
    """Return the data set that a source opens, once per process."""
    return open_any(source, min_domains=1)


def run_task_from_json(tree: dict[str, Any], out: str, source: str, threads: int) -> dict[str, Any]:
    """Do a task that another machine sent, in a folder that both see.

    Args:
        tree: `Task.to_json`.
        out: the sweep's folder.
        source: what opens the data set on this machine.
        threads: number of threads to use.

    Returns:
        the outcome, as a dictionary.
    """
    torch.set_num_threads(threads)
    task = Task.from_json(tree)
    task.load_plugins()  # one of them may make the data set
    return asdict(run_task(task, Path(out), open_study_dataset(source), quiet_callbacks((), Path(out))))
