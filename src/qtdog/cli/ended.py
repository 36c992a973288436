"""SIGTERM as an ordinary end of the program, so that temporary files are removed on the way out."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

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
