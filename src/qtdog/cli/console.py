"""Where the commands write: results to standard output, everything else, progress too, to standard error."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Self

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from qtdog.api.display import RANK, SPEAKS, SafeConsole, err, out
from qtdog.api.display import CountingBar as CountingBar
from qtdog.api.display import TrainingBar as TrainingBar
from qtdog.api.display import warn as warn
from qtdog.core.printable import printable


def fail(text: str) -> None:
    """Print an error to standard error, of whichever process."""
    where = "" if SPEAKS else f" (process {RANK})"
    console = SafeConsole(stderr=True)
    console.print(Text.assemble((f"error{where}:", "bold red"), " ", text), highlight=False, soft_wrap=True)


def print_text(text: str) -> None:
    """Print a result as it is, with its own line ends; what is no character in it is a `?`."""
    typer.echo(printable(text), nl=False)


def print_json(value: Any) -> None:
    """Print one JSON document, for programs."""
    if SPEAKS:
        typer.echo(json.dumps(value, indent=1))


def terminal_width() -> int | None:
    """Return the characters of a line of the terminal; None where standard output is a file or another program."""
    return out.width if out.is_terminal else None


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table, numbers to the right. In a narrow terminal it continues below itself; no cell is broken."""
    from qtdog.report.render import Table, text_cells, to_text

    if SPEAKS:
        table = Table(title or "", list(headers), text_cells(rows))
        print_text(to_text([table], terminal_width()) + "\n")


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
    """Leave the block through its `finally` clauses when SIGTERM ends the process, as Ctrl-C does.

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
