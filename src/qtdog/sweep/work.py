"""Doing one task, in this process: what every engine calls."""

from __future__ import annotations

import errno
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtdog.core.errors import FolderInUseError, Interrupted, QtdogError
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import without_unreadable
from qtdog.ensemble.assemble import Order, assemble, finished
from qtdog.ensemble.evaluation import open_exam
from qtdog.ensemble.members import read_member, share_splits
from qtdog.ensemble.teacher import open_teacher
from qtdog.ensemble.weight_averaging import Recipe
from qtdog.runs.folder import RunFolder
from qtdog.sweep.notes import Outcome, Status
from qtdog.sweep.task import Task
from qtdog.training.checkpoint import Checkpoint, read_checkpoint
from qtdog.training.fork import train_prefix
from qtdog.training.loggers import watched
from qtdog.training.run import Voice, run
from qtdog.training.shared_updates import Companion

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def perform(task: Task, out: Path, dataset: DomainDataset, voice: Voice) -> Outcome:
    """Do a task, or go on with it, and return how it ended; never raises an Exception.

    Args:
        task: what to do; what it needs is done.
        out: the sweep's folder.
        dataset: the data that the task's configuration names, whole: `data.skip_unreadable` is done here.
        voice: how runs speak.
    """
    started = time.perf_counter()
    status: Status
    try:
        if _skips_unreadable(task, out):
            dataset = without_unreadable(dataset, voice.progress)
        trained_s = _WORK[task.kind](task, out, dataset, voice)
        return Outcome(task.name, "done", seconds=_since(started), trained_s=trained_s)
    except FolderInUseError as error:
        status, caught = "busy", error
    except Interrupted as error:
        status, caught = "stopped", error
    except QtdogError as error:
        status, caught = ("disk" if is_disk_error(error) else "failed"), error
    except Exception as error:
        traceback.print_exc()
        status, caught = ("disk" if is_disk_error(error) else "failed"), error
    reason = str(caught) or type(caught).__name__
    return Outcome(task.name, status, reason[:1000], type(caught).__name__, seconds=_since(started))


def quiet_voice(loggers: Sequence[str], folder: Path) -> Voice:
    """Return how a run speaks where nobody watches: warnings to standard error, numbers to the loggers.

    Raises:
        ConfigError: an unknown logger.
    """
    return Voice(watched(loggers, folder), warn=lambda text: print(text, file=sys.stderr, flush=True))


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
    config = task.config if task.join is None else RunFolder(out / task.join.members[0]).read_config()
    return config is not None and config.data.skip_unreadable


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _run(task: Task, out: Path, dataset: DomainDataset, voice: Voice) -> float:
    assert task.config is not None
    folder = RunFolder(task.folder(out))
    start = _checkpoint(task, out, voice)
    teacher = open_teacher(task.config, dataset)
    along = [Companion(config, RunFolder(out / name)) for name, config in task.along]
    result = run(
        task.config, dataset, folder, resume=True, voice=voice, fork_from=start, teacher=teacher, companions=along
    )
    return float(result["trained_s"])


def _checkpoint(task: Task, out: Path, voice: Voice) -> Checkpoint | None:
    """Return where a run begins; None for step 0, also where the beginning is gone: the outcome is the same."""
    path = RunFolder(out / task.begin).checkpoints / f"step-{task.step:08d}"
    if not task.begin or not path.is_dir():
        return None
    try:
        return read_checkpoint(path)
    except QtdogError as error:
        voice.warn(f"{error}; training from step 0 instead")
        return None


def _prefix(task: Task, out: Path, dataset: DomainDataset, voice: Voice) -> float:
    assert task.config is not None
    made = train_prefix(task.config, dataset, RunFolder(task.folder(out)), until=task.step, voice=voice)
    return float(made.state.get("trained_s", 0.0))


def _ensemble(task: Task, out: Path, dataset: DomainDataset, voice: Voice) -> float:
    assert task.join is not None
    folder = RunFolder(task.folder(out))
    order = Order(task.join.kind, folder.model_file, Recipe(pick=task.join.pick))
    members = [read_member(out / name) for name in task.join.members]
    with folder.lock():
        if finished(members, order) is None:
            exam = open_exam(members[0].config, dataset, same_splits=share_splits(members), progress=voice.progress)
            assemble(members, order, exam, warn=voice.warn)
    return 0.0


_WORK: dict[str, Callable[[Task, Path, DomainDataset, Voice], Any]] = {
    "run": _run,
    "prefix": _prefix,
    "ensemble": _ensemble,
}
