"""How long a study takes: the throughput of a running sweep, and the estimate of a dry run."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtdog.core.config import Config
from qtdog.core.errors import RunError
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import Outcome, read_journal
from qtdog.sweep.plan import Task
from qtdog.sweep.runner import is_done, steps_made
from qtdog.training.step_time import OVERHEAD


def cost_class(config: Config) -> tuple[object, ...]:
    """Return what decides how long one step takes: network, size, batch, precision and the axes.

    Example:
        >>> cost_class(Config()) == cost_class(Config.model_validate({"train": {"seed": 3}}))
        True
    """
    data, model, axes = config.data, config.model, (config.objective.name, config.step_rule.name)
    plan = config.train
    return (model.backbone, data.image_size, data.batch_size, plan.precision, plan.accumulate, *axes)


class Throughput:
    """Seconds per step of each class of runs, from what is finished.

    Args:
        tasks: of the sweep.
        out: its folder; finished runs and the journal there are read.

    Attributes:
        overhead: time of a run as a multiple of that of its steps: start, evaluations, checkpoints.
        n: number of runs that were measured.
    """

    def __init__(self, tasks: Sequence[Task], out: Path) -> None:
        self._out = out
        self._sums: dict[tuple[object, ...], tuple[float, int]] = {}
        journal = [line for line in read_journal(out).values() if line["trained_s"] > 0 and line["steps"] > 0]
        trained_s = sum(line["trained_s"] for line in journal)
        self.overhead = sum(line["seconds"] for line in journal) / trained_s if trained_s else OVERHEAD
        for task in tasks:
            if task.kind == "run" and is_done(task, out):
                self._count(task, finished_step_s(task, out))

    @property
    def n(self) -> int:
        """Number of runs that were measured."""
        return sum(count for _, count in self._sums.values())

    def _count(self, task: Task, step_s: float | None) -> None:
        if step_s is None or task.config is None:
            return
        key = cost_class(task.config)
        total, n = self._sums.get(key, (0.0, 0))
        self._sums[key] = (total + step_s, n + 1)

    def add(self, task: Task, outcome: Outcome) -> None:
        """Count a task that was done just now."""
        if task.steps > 0 and outcome.trained_s > 0:
            self._count(task, outcome.trained_s / task.steps)

    def step_s(self, config: Config) -> float | None:
        """Return the mean seconds per step of runs like this one; of all runs, if there is none; None without any."""
        key = cost_class(config)
        known = [self._sums[key]] if key in self._sums else list(self._sums.values())
        n = sum(count for _, count in known)
        return sum(total for total, _ in known) / n if n else None

    def left_s(self, waiting: Sequence[Task], running: Sequence[Task]) -> float | None:
        """Return the seconds until all is done with as many at a time as run now; None if nothing was measured yet."""
        total = 0.0
        for task in [*waiting, *running]:
            if task.config is None or task.updates_from:
                continue
            step_s = self.step_s(task.config)
            if step_s is None:
                return None
            last = task.step if task.kind == "fork_point" else task.config.train.steps
            begun = steps_made(task, self._out) if task in running else 0
            first = max(begun, task.step if task.kind == "run" else 0)
            total += self.overhead * step_s * max(0, last - first)
        return total / max(1, len(running))


def finished_step_s(task: Task, out: Path) -> float | None:
    """Return the training seconds per step of a finished run; None if it says nothing of it."""
    try:
        result = RunFolder(task.folder(out)).read_result() or {}
        assert task.config is not None
        steps = task.config.train.steps - result["forked_from_step"]
        return result["trained_s"] / steps if result["trained_s"] > 0 and steps > 0 else None
    except (RunError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Schedule:
    """What a simulation came to.

    Attributes:
        wall_s: from the first start to the last end.
        busy_s: of all workers together.
        n_tasks: how many.
        critical_s: of the longest chain of tasks that need each other: no number of workers gets below it.
    """

    wall_s: float
    busy_s: float
    n_tasks: int
    critical_s: float


def simulate(tasks: Sequence[Task], slots: int, seconds: Callable[[Task], float]) -> Schedule:
    """Return how long tasks take with `slots` workers, begun in their order as soon as what they need is done.

    Args:
        tasks: to do; what they need and is not among them counts as done.
        slots: number of workers.
        seconds: duration of a task.

    Example:
        >>> tasks = [Task("p", "fork_point", 0), Task("a", "run", 0, fork_from="p"), Task("b", "run", 0, fork_from="p")]
        >>> simulate(tasks, 2, lambda task: 10.0)
        Schedule(wall_s=20.0, busy_s=30.0, n_tasks=3, critical_s=20.0)
    """
    names = {task.name for task in tasks}
    waiting, running, now = list(tasks), [], 0.0
    ends: dict[str, float] = {}
    chains: dict[str, float] = {}
    busy = 0.0
    while waiting or running:
        ready = (task for task in waiting if all(name in ends or name not in names for name in task.needs))
        task = next(ready, None) if len(running) < slots else None
        if task is not None:
            waiting.remove(task)
            duration = seconds(task)
            busy += duration
            chains[task.name] = duration + max((chains.get(name, 0.0) for name in task.needs), default=0.0)
            heapq.heappush(running, (now + duration, task.name))
            continue
        now, name = heapq.heappop(running)
        ends[name] = now
    return Schedule(now, busy, len(tasks), max(chains.values(), default=0.0))


def task_seconds(task: Task, step_s: Mapping[str, float], *, overhead: float) -> float:
    """Return how long a task takes.

    Args:
        task: a run, a fork point, or an ensemble (which has no steps).
        step_s: seconds per step, by task name.
        overhead: time of a run as a multiple of that of its steps (start, evaluations, checkpoints).
    """
    return task.steps * step_s.get(task.name, 0.0) * overhead
