"""Progress of downloads."""

from __future__ import annotations

from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qtdog.cli.console import err


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
