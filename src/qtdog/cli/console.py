"""Where the commands write: results to standard output, everything else, progress too, to standard error."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from qtdog.core.progress import RunCallback

if TYPE_CHECKING:  # the command line must answer --help at once
    from qtdog.core.config import Config
    from qtdog.runs.record import Record

# Of several processes (`accelerate launch`) only the first one speaks, but each may fail.
RANK = os.environ.get("RANK", "0")
SPEAKS = RANK == "0"

out = Console(quiet=not SPEAKS)
err = Console(stderr=True, quiet=not SPEAKS)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    err.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)


def fail(text: str) -> None:
    """Print an error to standard error, of whichever process."""
    where = "" if SPEAKS else f" (process {RANK})"
    console = Console(stderr=True)
    console.print(f"[bold red]error{where}:[/] {escape(text)}", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document, for programs."""
    if SPEAKS:
        typer.echo(json.dumps(value, indent=1))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table, numbers to the right; names from files are shown as they are, never read as markup."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, header in enumerate(headers):
        numbers = i > 0 and all(row[i][:1] in "–-0123456789" for row in rows)  # an empty cell is none of them, and fits
        table.add_column(escape(header), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)


class TrainingBar(RunCallback):
    """Shows loss, source accuracy, images per second and time left."""

    def on_start(self, config: Config, step: int) -> None:
        """Show the title and an empty bar."""
        from qtdog.runs.finished import method_name

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  source {task.fields[source]}  {task.fields[rate]} images/s"),
            TimeRemainingColumn(),
        )
        title = f"{method_name(config.model_dump())}, unseen: {config.data.target}"
        if not err.is_terminal:
            err.print(title, highlight=False, markup=False, soft_wrap=True)
        self._progress = Progress(*columns, console=err, disable=not err.is_terminal)
        self._progress.start()
        self._task = self._progress.add_task(
            title, total=config.train.steps, completed=step, loss="–", source="–", rate="–"
        )
        self._steps, self._shown, self._n_images, self._started = config.train.steps, 0.0, 0, time.perf_counter()

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
        from qtdog.report.tables import percent

        source = percent(record.seen.source_accuracy)
        self._progress.update(self._task, source=source)
        if not err.is_terminal:
            target = f"  unseen {percent(record.test_accuracy)}" if record.test_accuracy is not None else ""
            loss = f"  loss {record.train_loss:.3f}" if record.train_loss is not None else ""
            step = f"step {record.seen.step}/{self._steps}"
            err.print(f"  {step}{loss}  source {source}{target}", highlight=False, soft_wrap=True)

    def on_end(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


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


class ByteBar:
    """A callback (file, bytes so far, bytes in all or None) that shows a bar per file; a context manager."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=err, disable=not err.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        """Return the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bars from the terminal."""
        self._progress.stop()

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """Show `done` of `total` bytes of a file."""
        if name not in self._tasks:
            self._progress.start()
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)
        if done == total:
            self._progress.stop()  # the next step has a bar of its own


EXIT_CODE = 128 + signal.SIGTERM


@contextlib.contextmanager
def tidy_end() -> Iterator[None]:
    """Leave the block through its `finally` clauses when the process is told to end (SIGTERM), as Ctrl-C does.

    Example:
        >>> with tidy_end():
        ...     signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        False
    """
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(_number: int, _frame: FrameType | None) -> None:
    sys.exit(EXIT_CODE)
