"""How fast the tasks of a sweep are, and how long the rest will take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qtdog.core.config import Config
from qtdog.runs.folder import RunFolder
from qtdog.sweep.notes import Outcome, read_journal
from qtdog.sweep.state import is_done, step_of
from qtdog.sweep.task import Task

OVERHEAD = 1.2  # until something was measured


def cost_class(config: Config) -> tuple[object, ...]:
    """Return what decides how long one step takes: network, size, batch, precision and the axes.

    Example:
        >>> cost_class(Config()) == cost_class(Config.model_validate({"train": {"seed": 3}}))
        True
    """
    data, model, axes = config.data, config.model, (config.objective.name, config.step_rule.name)
    return (model.backbone, data.image_size, data.batch_size, config.train.precision, *axes)


class Pace:
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
            if task.config is None or task.after:
                continue
            step_s = self.step_s(task.config)
            if step_s is None:
                return None
            last = task.step if task.kind == "prefix" else task.config.train.steps
            begun = step_of(task, self._out) if task in running else 0
            first = max(begun, task.step if task.kind == "run" else 0)
            total += self.overhead * step_s * max(0, last - first)
        return total / max(1, len(running))


def finished_step_s(task: Task, out: Path) -> float | None:
    """Return the training seconds per step of a finished run; None if it says nothing of it."""
    try:
        result = json.loads(RunFolder(task.folder(out)).result_file.read_text())
        assert task.config is not None
        steps = task.config.train.steps - result["forked_from_step"]
        return result["trained_s"] / steps if result["trained_s"] > 0 and steps > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
