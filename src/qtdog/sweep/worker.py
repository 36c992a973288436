"""Do one task of a sweep, in this process or on another machine."""

from __future__ import annotations

import errno
import io
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qtdog.core.errors import FolderInUseError, Interrupted, QtdogError
from qtdog.core.files import clear_disk_errors
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_any, without_unreadable
from qtdog.ensemble.assemble import EnsembleSpec, assemble, finished
from qtdog.ensemble.evaluation import open_evaluation_set
from qtdog.ensemble.members import read_member, share_splits
from qtdog.ensemble.teacher import load_teacher
from qtdog.ensemble.weight_averaging import Recipe
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import Outcome, Status
from qtdog.sweep.plan import Task
from qtdog.training.checkpoint import Checkpoint, read_checkpoint
from qtdog.training.loggers import with_loggers
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.shared_updates import SharedRun

Parcels = Mapping[str, bytes]  # folder name → its content


def pack(folder: Path, only: Sequence[str] = ()) -> bytes:
    """Return the content of a run folder as an uncompressed tar archive, without locks and temporary files.

    Args:
        folder: of the run.
        only: names in it, like "checkpoint/step-00000010"; all if empty.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in only or sorted(path.name for path in folder.iterdir()):
            archive.add(folder / name, arcname=name, filter=_wanted)
    return stream.getvalue()


def _wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(info.name).name
    return None if name == ".lock" or name.endswith(".tmp") else info


def unpack(content: bytes, folder: Path) -> None:
    """Make `folder` hold what `pack` packed, all at once; what it held before is replaced.

    Raises:
        tarfile.TarError: the archive is damaged, or would write outside of the folder.
        RunError: the disk is full.
    """
    with clear_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            new = temporary / "new"
            with tarfile.open(fileobj=io.BytesIO(content), mode="r") as archive:
                archive.extractall(new, filter="data")
            if folder.exists():
                folder.rename(temporary / "old")
            new.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def inputs(task: Task, out: Path) -> dict[str, bytes]:
    """Return what another machine needs to do a task: what it came to so far, its beginning, its members."""
    parcels = {}
    if task.folder(out).is_dir():
        parcels[task.name] = pack(task.folder(out))
    if task.begin:
        checkpoint = f"checkpoint/step-{task.step:08d}"
        if (out / task.begin / checkpoint).is_dir():
            parcels[task.begin] = pack(out / task.begin, [checkpoint])
    for name in task.join.members if task.join else ():
        parcels[name] = pack(out / name)
    return parcels


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def perform(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> Outcome:
    """Do a task, or go on with it, and return how it ended; never raises an Exception.

    Args:
        task: what to do; what it needs is done.
        out: the sweep's folder.
        dataset: the data that the task's configuration names, whole: `data.skip_unreadable` is done here.
        callbacks: how runs speak.
    """
    started = time.perf_counter()
    status: Status
    try:
        if _skips_unreadable(task, out):
            dataset = without_unreadable(dataset, callbacks.progress)
        trained_s = _WORK[task.kind](task, out, dataset, callbacks)
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


def quiet_callbacks(loggers: Sequence[str], folder: Path) -> RunCallbacks:
    """Return how a run speaks where nobody watches: warnings to standard error, numbers to the loggers.

    Raises:
        ConfigError: an unknown logger.
    """
    return RunCallbacks(with_loggers(loggers, folder), warn=lambda text: print(text, file=sys.stderr, flush=True))


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


def _run(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.config is not None
    folder = RunFolder(task.folder(out))
    start = _checkpoint(task, out, callbacks)
    teacher = load_teacher(task.config, dataset)
    along = [SharedRun(config, RunFolder(out / name)) for name, config in task.along]
    result = run(
        task.config,
        dataset,
        folder,
        resume=True,
        callbacks=callbacks,
        fork_from=start,
        teacher=teacher,
        companions=along,
    )
    return float(result["trained_s"])


def _checkpoint(task: Task, out: Path, callbacks: RunCallbacks) -> Checkpoint | None:
    """Return where a run begins; None for step 0, also where the beginning is gone: the outcome is the same."""
    path = RunFolder(out / task.begin).checkpoints / f"step-{task.step:08d}"
    if not task.begin or not path.is_dir():
        return None
    try:
        return read_checkpoint(path)
    except QtdogError as error:
        callbacks.warn(f"{error}; training from step 0 instead")
        return None


def _prefix(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.config is not None
    made = train_fork_point(task.config, dataset, RunFolder(task.folder(out)), until=task.step, callbacks=callbacks)
    return float(made.state.get("trained_s", 0.0))


def _ensemble(task: Task, out: Path, dataset: DomainDataset, callbacks: RunCallbacks) -> float:
    assert task.join is not None
    folder = RunFolder(task.folder(out))
    spec = EnsembleSpec(task.join.kind, folder.model_file, Recipe(pick=task.join.pick))
    members = [read_member(out / name) for name in task.join.members]
    with folder.lock():
        if finished(members, spec) is None:
            evaluation_set = open_evaluation_set(
                members[0].config, dataset, same_splits=share_splits(members), progress=callbacks.progress
            )
            assemble(members, spec, evaluation_set, warn=callbacks.warn)
    return 0.0


_WORK: dict[str, Callable[[Task, Path, DomainDataset, RunCallbacks], Any]] = {
    "run": _run,
    "prefix": _prefix,
    "ensemble": _ensemble,
}


Answer = dict[str, Any]


@lru_cache(maxsize=2)
def _dataset(source: str) -> DomainDataset:
    return open_any(source, min_domains=1)


def do_task(tree: dict[str, Any], out: str, source: str, threads: int) -> Answer:
    """Do a task in a folder that this machine shares with the sweep's.

    Args:
        tree: `Task.to_json`.
        out: the sweep's folder.
        source: what opens the data set on this machine.
        threads: to use.

    Returns:
        the outcome, as a dictionary.
    """
    torch.set_num_threads(threads)
    callbacks = RunCallbacks(warn=lambda text: print(text, file=sys.stderr, flush=True))
    return asdict(perform(Task.from_json(tree), Path(out), _dataset(source), callbacks))


def do_task_elsewhere(tree: dict[str, Any], parcels: Parcels, source: str, threads: int) -> tuple[Answer, bytes]:
    """Do a task in a folder of this machine, and return the outcome and the run folder.

    Args:
        tree: `Task.to_json`.
        parcels: what it needs (`sweep.worker.inputs`).
        source: what opens the data set on this machine.
        threads: to use.
    """
    with tempfile.TemporaryDirectory(prefix="qtdog-") as name:
        for folder, content in parcels.items():
            unpack(content, Path(name) / folder)
        # only this run's folder goes back: whoever would come along trains by itself
        answer = do_task(tree | {"along": []}, name, source, threads)
        made = Path(name) / tree["name"]
        return answer, pack(made) if made.is_dir() else b""
