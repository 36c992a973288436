"""Progress of long work: bars on a terminal, one line per evaluation elsewhere."""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from qtdog.cli.console import err
from qtdog.core.config import Config
from qtdog.report.tables import method_name, percent
from qtdog.runs.record import Record


class TrainingBar:
    """Shows loss, source accuracy, images per second and time left."""

    def __init__(self, progress: Progress, task: TaskID, config: Config, start: int) -> None:
        self._progress, self._task, self._steps, self._shown = progress, task, config.train.steps, 0.0
        self._n_images, self._started, self._start = 0, time.perf_counter(), start

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """Move the bar."""
        self._n_images += n_images
        now = time.perf_counter()
        if now - self._shown > 0.1 or step == self._steps:
            self._shown = now
            rate = self._n_images / (now - self._started)
            self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", rate=f"{rate:,.0f}")

    def on_record(self, record: Record) -> None:
        """Show an evaluation."""
        source = percent(record.seen.source_accuracy)
        self._progress.update(self._task, source=source)
        if not err.is_terminal:
            target = f"  unseen {percent(record.test_accuracy)}" if record.test_accuracy is not None else ""
            loss = f"  loss {record.train_loss:.3f}" if record.train_loss is not None else ""
            step = f"step {record.seen.step}/{self._steps}"
            err.print(f"  {step}{loss}  source {source}{target}", highlight=False)


@contextlib.contextmanager
def training_bar(config: Config, start: int) -> Iterator[TrainingBar]:
    """Yield the watcher of one run that begins at step `start`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  source {task.fields[source]}  {task.fields[rate]} images/s"),
        TimeRemainingColumn(),
    )
    title = f"{method_name(config.model_dump())}, unseen: {config.data.target}"
    if not err.is_terminal:
        err.print(title, highlight=False, markup=False)
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(title, total=config.train.steps, completed=start, loss="–", source="–", rate="–")
        yield TrainingBar(progress, task, config, start)


class CountingBar:
    """A progress callback (done, total) that shows a bar while there is something to count."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        if not err.is_terminal:
            return
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=err, transient=True)
            self._task = self._progress.add_task(self._title)
            self._progress.start()
            atexit.register(self._progress.stop)  # an error on the way must not leave the terminal without a cursor
        self._progress.update(self._task, completed=done, total=total)
        if done >= total:
            self._progress.stop()
            self._progress = None
