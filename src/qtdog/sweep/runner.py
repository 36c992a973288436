"""Drive a sweep: what is done, what is missing, in order, until nothing is."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, DataError, FolderInUseError, Interrupted, ModelError, QtdogError, RunError
from qtdog.core.files import lock_file, remove_leftovers
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.ensemble.teacher import load_teacher
from qtdog.runs.folder import RunFolder, last_line
from qtdog.sweep.journal import Outcome, append_journal, read_failures, remove_failure, save_failure, state_folder
from qtdog.sweep.plan import Task, keep_sharing
from qtdog.sweep.study import raise_all
from qtdog.training.build import build_components
from qtdog.training.stop import StopRequest

STATE_PARTS = ("failed", "studies")  # what a sweep writes piece by piece beside its runs
# Values that differ between runs without deciding whether their components fit together.
FREE = {
    "train": ("seed", "eval_every", "checkpoint_every"),
    "data": ("trial", "target", "source"),
    "model": ("init_seed",),
    "optimizer": ("lr", "weight_decay"),
}


def check_tasks(
    tasks: Sequence[Task],
    dataset: DomainDataset,
    progress: Progress = None,
    *,
    build: Callable[[Config, DomainDataset, Progress], str | None] | None = None,
) -> None:
    """Refuse tasks of which one has an unknown name, or components that do not fit together.

    Each distinct composition is built once.

    Args:
        tasks: what is to be done.
        dataset: its data.
        progress: of decoding images.
        build: returns why the components of a run cannot be built; None for `build_error`.

    Raises:
        ConfigError: every mistake, with the method that it is in.
    """
    build = build or build_error
    seen: set[str] = set()
    errors = []
    for task in tasks:
        if task.config is None or task.kind == "fork_point":
            continue
        composition = _composition(task.config, drawn="draw" in task.labels[0])
        if composition not in seen:
            seen.add(composition)
            error = build(task.config, dataset, progress)
            errors += [f"method '{task.labels[0]['method']}': {error}"] if error else []
    raise_all(errors)


def _composition(config: Config, *, drawn: bool) -> str:
    """Return what decides whether the components of a run fit together; of a random search's values only the names."""
    tree = config.model_dump(mode="json")
    for section, keys in FREE.items():
        for key in keys:
            tree[section].pop(key)
    tree["data"]["has_target"] = config.data.target != "none"
    if drawn:  # the draws lie in ranges that the study and the components declare
        tree["data"].pop("batch_size")
        for section in ("objective", "step_rule"):
            tree[section]["params"] = sorted(tree[section]["params"])
    return json.dumps(tree, sort_keys=True)


def build_error(config: Config, dataset: DomainDataset, progress: Progress) -> str | None:
    """Return why the components of a run cannot be built; None if they can."""
    try:
        teacher = load_teacher(config, dataset)
        build_components(config, dataset, progress=progress, teacher=teacher)
    except (ConfigError, DataError, ModelError) as error:
        return str(error)
    return None


def is_done(task: Task, out: Path) -> bool:
    """Return whether a task's result is there."""
    folder = RunFolder(task.folder(out))
    if task.kind == "fork_point":
        return (folder.checkpoints / f"step-{task.step:08d}" / "checkpoint.json").is_file()
    return folder.result_file.is_file() and folder.model_file.is_file() and folder.model_file.stat().st_size > 0


def _is_whole(task: Task, out: Path) -> bool:
    """Return whether a task's result is there, and its model file the very one that was written."""
    if not is_done(task, out) or task.kind == "fork_point":
        return is_done(task, out)
    folder = RunFolder(task.folder(out))
    stats = tuple(os.stat(file) for file in (folder.result_file, folder.model_file))
    files = tuple((one.st_ino, one.st_mtime_ns, one.st_ctime_ns, one.st_size) for one in stats)
    return _has_whole_model(folder.path, files)


@lru_cache(maxsize=100_000)
def _has_whole_model(path: Path, files: tuple[tuple[int, ...], ...]) -> bool:
    del files  # their hash is computed once for each version of them
    try:
        return RunFolder(path).finished_result() is not None
    except RunError:
        return False


def unfinished(tasks: Sequence[Task], out: Path) -> list[Task]:
    """Return the tasks that are still to be done, in their order; a fork point only if something waits for it.

    Runs that would share the updates of one that is done share their own.
    """
    missing = [task for task in tasks if not _is_whole(task, out)]
    wanted = {name for task in missing for name in task.needs}
    return keep_sharing([task for task in missing if task.kind != "fork_point" or task.name in wanted])


STATES = ("done", "running", "failed", "begun", "missing")


def task_states(tasks: Sequence[Task], out: Path) -> dict[str, str]:
    """Return the state of each task, one of `STATES`; begun is what stopped on the way."""
    failed = read_failures(out)
    return {task.name: _task_state(task, out, failed) for task in tasks}


def _task_state(task: Task, out: Path, failed: Collection[str]) -> str:
    if is_done(task, out):
        return "done"
    folder = task.folder(out)
    if is_in_use(folder):
        return "running"
    if task.name in failed:
        return "failed"
    return "begun" if folder.is_dir() else "missing"


def is_in_use(folder: Path) -> bool:
    """Return whether a process of this machine (or one that shares its locks) holds a run folder.

    The folder is asked through a shared lock, for which a process that wants the folder waits (`RunFolder.lock`).
    """
    file = folder / ".lock"
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        try:
            lock_file(stream.fileno(), shared=True)
        except BlockingIOError:
            return True
    return False


def discard_unfinished(tasks: Sequence[Task], out: Path) -> list[Task]:
    """Empty the folders of those tasks that are not done and that no process holds; return the others.

    Whether a task is done is asked under the folder's lock: another machine may have finished it meanwhile.
    """
    kept = []
    for task in tasks:
        folder = task.folder(out)
        if not folder.is_dir():
            continue
        try:
            with RunFolder(folder).lock():
                if is_done(task, out):
                    kept.append(task)
                    continue
                for path in folder.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    elif path.name != ".lock":
                        path.unlink()
        except FolderInUseError:
            kept.append(task)
    return kept


def steps_made(task: Task, out: Path) -> int:
    """Return how many updates of a task are known to be made: at its last evaluation or checkpoint."""
    folder = RunFolder(task.folder(out))
    if is_done(task, out):
        return task.config.train.steps if task.config and task.kind == "run" else task.step
    saved = sorted(path.name for path in folder.checkpoints.glob("step-*"))
    step = int(saved[-1].removeprefix("step-")) if saved else 0
    return max(step, last_line(folder.metrics_file).get("step", 0))


class Engine(Protocol):
    """Runs tasks side by side.

    Attributes:
        slots: how many at a time.
    """

    slots: int

    def start(self, task: Task) -> None:
        """Begin a task; there are free slots, and what it needs is done."""
        ...

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Return the tasks that ended since, after at most `timeout_s` seconds."""
        ...

    def stop(self) -> None:
        """Ask all that run to save their state and end; `poll` reports them."""
        ...

    def close(self) -> None:
        """Let go of everything; what still runs is ended."""
        ...


POLL_S = 0.2
BUSY_S = 5.0  # until a folder that another process held is looked at again
MAX_LOST = 5  # times that the process of one task may die before that counts as its failure


class SweepDisplay(Protocol):
    """Shows how a sweep goes."""

    def show(self, progress: SweepProgress) -> None:
        """Show the progress; called often."""
        ...

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Show that one task ended."""
        ...


@dataclass
class SweepProgress:
    """Where a sweep stands.

    Attributes:
        tasks: all of them.
        waiting: not begun, in their order.
        running: name → task, with the time of its start.
        done: names of what is finished.
        failed: name → why.
        later: names of what another process is at → when to look again.
    """

    tasks: Sequence[Task]
    waiting: list[Task]
    running: dict[str, tuple[Task, float]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failed: dict[str, Outcome] = field(default_factory=dict)
    later: dict[str, float] = field(default_factory=dict)

    def ready(self, now: float) -> Task | None:
        """Return the first waiting task that can begin."""
        for task in self.waiting:
            waits = task.updates_from and task.updates_from not in self.done
            if self.later.get(task.name, 0.0) <= now and self.done.issuperset(task.needs) and not waits:
                return task
        return None

    def blocked(self) -> list[Task]:
        """Return the waiting tasks that need one that failed, directly or not."""
        bad = set(self.failed)
        blocked = []
        for task in self.waiting:  # what a task needs comes before it
            if any(name in bad for name in task.needs):
                bad.add(task.name)
                blocked.append(task)
        return blocked


class Driver:
    """Keeps an engine busy with the tasks of a sweep.

    Args:
        tasks: of the plan, or some of them, with what they need.
        out: the sweep's folder.
        engine: runs them.
        display: shows how it goes.
        limit: begin at most so many tasks; None for all.
        poll_s: seconds that one look at the engine takes.
        busy_s: seconds until a folder that another process held is looked at again.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        out: Path,
        engine: Engine,
        display: SweepDisplay,
        *,
        limit: int | None = None,
        poll_s: float = POLL_S,
        busy_s: float = BUSY_S,
    ) -> None:
        missing = unfinished(tasks, out)
        names = {task.name for task in missing}
        self.progress = SweepProgress(tasks, missing, done={task.name for task in tasks if task.name not in names})
        self._out, self._engine, self._display, self._left = out, engine, display, limit
        self._poll_s, self._busy_s = poll_s, busy_s
        self._lost: Counter[str] = Counter()
        self._stopping: QtdogError | None = None

    def run(self) -> SweepProgress:
        """Do all that is missing and return how it went; a task that fails does not stop the others.

        Raises:
            Interrupted: a signal asked to stop; what ran has saved its state.
            RunError: the disk is full or cannot be written; what ran was asked to stop.
        """
        for place in (self._out, state_folder(self._out), *(state_folder(self._out) / name for name in STATE_PARTS)):
            remove_leftovers(place)
        for task in self.progress.tasks:
            if task.kind == "fork_point":  # one that is there is not begun again, which would do this
                remove_leftovers(RunFolder(task.folder(self._out)).checkpoints)
        with StopRequest() as stop:
            try:
                while not self._finished():
                    self._turn(stop.signal)
            finally:
                self._engine.close()
        self._display.show(self.progress)
        if self._stopping is not None:
            raise self._stopping
        return self.progress

    def _turn(self, signal: int | None) -> None:
        self._fill()
        for outcome in self._engine.poll(self._poll_s):
            self._take(outcome)
        self._display.show(self.progress)
        if signal is not None and self._stopping is None:
            self._stop(_interrupted(signal))

    def _finished(self) -> bool:
        progress = self.progress
        if progress.running:
            return False
        blocked = {task.name for task in progress.blocked()}
        nothing_left = all(task.name in blocked for task in progress.waiting)
        return self._stopping is not None or self._left == 0 or nothing_left

    def _fill(self) -> None:
        progress, now = self.progress, time.monotonic()
        while self._stopping is None and self._left != 0 and len(progress.running) < self._engine.slots:
            task = progress.ready(now)
            if task is None:
                return
            progress.waiting.remove(task)
            if is_done(task, self._out):  # another sweep in this folder was faster
                progress.done.add(task.name)
                continue
            self._engine.start(task)
            progress.running[task.name] = (task, now)
            self._left = None if self._left is None else self._left - 1

    def _take(self, outcome: Outcome) -> None:
        progress = self.progress
        if outcome.name not in progress.running:
            return
        task, _ = progress.running.pop(outcome.name)
        if outcome.status == "lost":
            outcome = self._lose(task, outcome)
        if outcome.status == "done":
            progress.done.add(task.name)
            remove_failure(task.name, self._out)
            append_journal(outcome, task.steps, self._out)
        elif outcome.status == "failed":
            progress.failed[task.name] = outcome
            progress.waiting = [_alone(one) if one.updates_from == task.name else one for one in progress.waiting]
            save_failure(outcome, self._out)
        else:
            self._put_back(task, outcome)
        self._display.ended(task, outcome)

    def _lose(self, task: Task, outcome: Outcome) -> Outcome:
        """Let a task whose process died be tried again, unless that happens each time."""
        if self._stopping is not None:  # the signal came before the run could save anything
            return replace(outcome, status="stopped", reason="")
        self._lost[task.name] += 1
        if self._lost[task.name] < MAX_LOST:
            return outcome
        return Outcome(task.name, "failed", f"{MAX_LOST} times {outcome.reason}", "lost", outcome.seconds)

    def _put_back(self, task: Task, outcome: Outcome) -> None:
        self.progress.waiting.insert(0, task)
        self._left = None if self._left is None else self._left + 1
        if outcome.status == "busy":
            self.progress.later[task.name] = time.monotonic() + self._busy_s
        if outcome.status == "disk" and self._stopping is None:
            self._stop(RunError(f"the sweep stopped, since it cannot write: {outcome.reason}"))

    def _stop(self, why: QtdogError) -> None:
        self._stopping = why
        self._engine.stop()


def _alone(task: Task) -> Task:
    """Return a task that makes its own updates."""
    return replace(task, updates_from="")


def _interrupted(number: int) -> Interrupted:
    error = Interrupted("stopped; what ran has saved its state, and the same command goes on from it")
    error.exit_code = 128 + number
    return error
