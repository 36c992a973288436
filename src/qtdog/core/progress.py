"""Callbacks: how long work tells its caller how far it is, and how a run tells of its steps and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qtdog.core.errors import Interrupted

Progress = Callable[[int, int], None] | None  # (done, total), after each item; None for silence


class RunCallback:
    """Base class of what follows a run: a progress bar, a logger, a stop. Each method does nothing by default.

    An exception leaves the run; `Interrupted` does so with a checkpoint of the present step.
    """

    def on_start(self, config: Any, step: int) -> None:
        """Training begins.

        Args:
            config: the configuration (`core.config.Config`); its `train.steps` is where training ends.
            step: updates made before.
        """

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """Update number `step` was made, with `n_images` images and that training loss."""

    def on_record(self, record: Any) -> None:
        """An evaluation was made (`runs.record.Record`)."""

    def on_save(self, step: int) -> None:
        """A checkpoint of `step` is about to be written."""

    def on_end(self) -> None:
        """Training ended, also by an exception; called once for each `on_start` that returned."""


class CallbackList(RunCallback):
    """Callbacks that are called one after another; those that started are all ended."""

    def __init__(self, callbacks: Sequence[RunCallback]) -> None:
        self._callbacks = callbacks
        self._started: list[RunCallback] = []

    def on_start(self, config: Any, step: int) -> None:
        """Start each; one that fails ends those before it."""
        try:
            for callback in self._callbacks:
                callback.on_start(config, step)
                self._started.append(callback)
        except BaseException:
            self.on_end()
            raise

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """Tell each."""
        for callback in self._callbacks:
            callback.on_step(step, loss, n_images)

    def on_record(self, record: Any) -> None:
        """Tell each."""
        for callback in self._callbacks:
            callback.on_record(record)

    def on_save(self, step: int) -> None:
        """Tell each."""
        for callback in self._callbacks:
            callback.on_save(step)

    def on_end(self) -> None:
        """End those that started."""
        while self._started:
            self._started.pop().on_end()


class StopAfter(RunCallback):
    """Stop after some updates, of one run or of several, as a signal does: with a checkpoint, and `Interrupted`.

    Args:
        n: updates; at least 1.

    Example:
        >>> stop = StopAfter(2)
        >>> stop.on_step(6, 0.5, 32)
        >>> stop.on_step(7, 0.5, 32)
        Traceback (most recent call last):
        qtdog.core.errors.Interrupted: stopped after 2 updates, at step 7
    """

    def __init__(self, n: int) -> None:
        self._left = self.n = n

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """Count one update."""
        self._left -= 1
        if self._left <= 0:
            raise Interrupted(f"stopped after {self.n} updates, at step {step}")
