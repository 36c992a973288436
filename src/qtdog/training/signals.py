"""Stopping on request: the first SIGINT or SIGTERM asks, a second one kills."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from qtdog.core.errors import Interrupted


class StopRequest:
    """A context in which SIGINT and SIGTERM are remembered instead of killing the process.

    A signal that nothing checked for ends the block with Interrupted: it is meant for the whole command.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.check_interrupt()  # raises Interrupted once a signal came
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Take over the handlers; outside the main thread signals stay as they are."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back; raise Interrupted if a signal came and the block ended well."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None:
            self.check_interrupt()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        for again, handler in self._previous.items():
            signal.signal(again, handler)

    def check_interrupt(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.signal is not None:
            raise interruption(self.signal)


def interruption(number: int) -> Interrupted:
    """Return the error for a signal, with the exit code that shells expect (128 + number)."""
    name = signal.Signals(number).name
    error = Interrupted(f"stopped by {name}; the state was saved, and --resume goes on from it")
    error.exit_code = 128 + number
    return error


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Keep the first SIGINT or SIGTERM until the end of the block, where it acts as if it came then; a second one acts.

    For code in C++ that calls back into Python and ends the process (SIGABRT) when that raises.

    Example:
        >>> with held_signals():
        ...     pass
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not made in Python

    def remember(number: int, _: FrameType | None) -> None:
        came.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, remember)
    try:
        yield
    finally:
        restore()
        if came:
            signal.raise_signal(came[0])
