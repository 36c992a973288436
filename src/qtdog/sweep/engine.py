"""What a sweep needs of whoever runs its tasks."""

from __future__ import annotations

from typing import Protocol

from qtdog.sweep.notes import Outcome
from qtdog.sweep.task import Task


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
