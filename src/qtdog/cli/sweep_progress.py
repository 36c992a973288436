"""What a running sweep shows: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qtdog.api.display import duration_text
from qtdog.cli.console import err

if TYPE_CHECKING:
    from qtdog.sweep.estimate import Throughput
    from qtdog.sweep.journal import Outcome
    from qtdog.sweep.plan import Task
    from qtdog.sweep.runner import SweepProgress as Progress

REFRESH_S = 0.5
N_SHOWN = 20


class ProgressDisplay:
    """Shows the progress of a sweep: counts, what runs, what failed last, time left."""

    def __init__(self, out: Path, live: Live | None) -> None:
        self._out, self._live = out, live
        self._shown = 0.0
        self._pace: Throughput | None = None

    def show(self, progress: Progress) -> None:
        """Refresh the table, at most twice a second."""
        from qtdog.sweep.estimate import Throughput

        now = time.monotonic()
        if self._live is None or now - self._shown < REFRESH_S:
            return
        self._shown = now
        self._pace = self._pace or Throughput(progress.tasks, self._out)
        self._live.update(Group(self._running(progress), self._counts(progress)), refresh=True)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Count one task's end; print it where there is no table."""
        if self._pace is not None and outcome.status == "done":
            self._pace.add(task, outcome)
        if self._live is None or outcome.status == "failed":
            text = f"{outcome.status:7} {task_text(task)}  {outcome.seconds:.1f} s"
            shown = outcome.reason and outcome.status != "stopped"
            reason = f"  {outcome.reason.splitlines()[0]}" if shown else ""
            err.print(text + reason, highlight=False, markup=False, soft_wrap=True)

    def _running(self, progress: Progress) -> Table:
        from qtdog.sweep.runner import steps_made

        table = Table(box=None, pad_edge=False)
        for header in ("running", "step", "for"):
            table.add_column(header)
        now = time.monotonic()
        for task, started in list(progress.running.values())[:N_SHOWN]:
            last = task.step if task.kind == "fork_point" or task.config is None else task.config.train.steps
            step = f"{steps_made(task, self._out)}/{last}" if last else "–"
            table.add_row(task_text(task), step, duration_text(now - started))
        return table

    def _counts(self, progress: Progress) -> Text:
        failed = f", [red]{len(progress.failed)} failed[/]" if progress.failed else ""
        left = (
            self._pace.left_s(progress.waiting, [task for task, _ in progress.running.values()]) if self._pace else None
        )
        time_left = f", about {duration_text(left)} left" if left is not None else ""
        counts = f"{len(progress.done)} of {len(progress.tasks)} done, {len(progress.running)} running"
        return Text.from_markup(f"{counts}{failed}{time_left}")


@contextlib.contextmanager
def progress_display(out: Path) -> Iterator[ProgressDisplay]:
    """Yield the progress display of a sweep in the folder `out`."""
    if not err.is_terminal:
        yield ProgressDisplay(out, None)
        return
    with Live(console=err, auto_refresh=False, refresh_per_second=4) as live:
        display = ProgressDisplay(out, live)
        yield display
        live.refresh()


def task_text(task: Task) -> str:
    """Return what a task is, for people."""
    from qtdog.sweep.study import label_text

    if task.kind == "fork_point":
        return f"shared steps {task.name.removeprefix('prefix-')}"
    return label_text(task.labels[0]) if task.labels else task.name


def failure_lines(tasks: Sequence[Task], failed: Mapping[str, Outcome], blocked: Sequence[Task]) -> list[str]:
    """Return one line for each failure, and how many tasks wait for one."""
    known = {task.name: task for task in tasks}
    lines = [f"  {task_text(known[name])}: {outcome.reason}" for name, outcome in failed.items() if name in known]
    return lines + ([f"  {len(blocked)} more need one of these"] if blocked else [])
