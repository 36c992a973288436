"""Progress callbacks of long work: how a function below tells a bar above how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None] | None  # (done, total), after each item; None for silence
