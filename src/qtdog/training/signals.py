"""Stopping on request: the first SIGINT or SIGTERM asks, a second one kills."""

from __future__ import annotations

import signal
import threading
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
