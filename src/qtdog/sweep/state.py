"""What is done and what is missing: read from the run folders, so that nothing else need be right."""

from __future__ import annotations

import fcntl
from collections.abc import Collection, Sequence
from pathlib import Path

from qtdog.runs.folder import RunFolder
from qtdog.sweep.notes import last_line, read_failures
from qtdog.sweep.sharing import keep_sharing
from qtdog.sweep.task import Task


def is_done(task: Task, out: Path) -> bool:
    """Return whether a task's result is there."""
    folder = RunFolder(task.folder(out))
    if task.kind == "prefix":
        return (folder.checkpoints / f"step-{task.step:08d}" / "checkpoint.json").is_file()
    return folder.result_file.is_file() and folder.model_file.is_file()


def unfinished(tasks: Sequence[Task], out: Path) -> list[Task]:
    """Return the tasks that are still to be done, in their order; a beginning only if something waits for it.

    Runs that would share the updates of one that is done share their own.
    """
    missing = [task for task in tasks if not is_done(task, out)]
    wanted = {name for task in missing for name in task.needs}
    return keep_sharing([task for task in missing if task.kind != "prefix" or task.name in wanted])


STATES = ("done", "running", "failed", "begun", "missing")


def standings(tasks: Sequence[Task], out: Path) -> dict[str, str]:
    """Return the state of each task, one of `STATES`; begun is what stopped on the way."""
    failed = read_failures(out)
    return {task.name: _standing(task, out, failed) for task in tasks}


def _standing(task: Task, out: Path, failed: Collection[str]) -> str:
    if is_done(task, out):
        return "done"
    folder = task.folder(out)
    if is_in_use(folder):
        return "running"
    if task.name in failed:
        return "failed"
    return "begun" if folder.is_dir() else "missing"


def is_in_use(folder: Path) -> bool:
    """Return whether a process of this machine (or one that shares its locks) holds a run folder."""
    file = folder / ".lock"
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def step_of(task: Task, out: Path) -> int:
    """Return how many updates of a task are known to be made: at its last evaluation or checkpoint."""
    folder = RunFolder(task.folder(out))
    if is_done(task, out):
        return task.config.train.steps if task.config and task.kind == "run" else task.step
    saved = sorted(path.name for path in folder.checkpoints.glob("step-*"))
    step = int(saved[-1].removeprefix("step-")) if saved else 0
    return max(step, last_line(folder.metrics_file).get("step", 0))
