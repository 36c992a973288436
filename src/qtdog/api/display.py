"""How long work shows itself: bars in a terminal or a notebook, else a line now and then; messages.

Results go to standard output; everything else, progress too, to standard error.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from qtdog.api.python_words import python_words
from qtdog.core.printable import printable
from qtdog.core.progress import RunCallback

if TYPE_CHECKING:  # the command line must answer --help at once
    from qtdog.core.config import Config
    from qtdog.runs.record import Record
    from qtdog.training.run import RunCallbacks

# Of several processes (`accelerate launch`) only the first one speaks, but each may fail.
RANK = os.environ.get("RANK", "0")
SPEAKS = RANK == "0"


class SafeConsole(Console):
    """A console on which names of classes, tensors and files, and messages with them, are characters and no more.

    Escapes of styles and of moving bars are made behind this filter.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is shown, its text filtered by `core.safe_text.printable`."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


out = SafeConsole(quiet=not SPEAKS, markup=False)
err = SafeConsole(stderr=True, quiet=not SPEAKS, markup=False)
MEASURED_STEPS, MEASURED_S = 3, 2.0  # after which the time of a run is estimated
WORTH_SAYING_S = 30.0  # of a run that is left
LINE_EVERY_S = 30.0  # between two lines about the steps, where there is no bar


def shows_bars() -> bool:
    """Return whether bars can be drawn: in a terminal, or in a notebook that has ipywidgets."""
    return err.is_terminal or (err.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


def duration_text(seconds: float) -> str:
    """Return a duration for people.

    Example:
        >>> duration_text(42), duration_text(200), duration_text(9000), duration_text(300_000)
        ('42 s', '3 min', '2.5 h', '3.5 days')
    """
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def say(text: str) -> None:
    """Print a line to standard error."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    err.print(Text.assemble(("warning:", "yellow"), " ", text), highlight=False, soft_wrap=True)


class TrainingBar(RunCallback):
    """Shows loss, source accuracy, images per second and time left of one run after another.

    Attributes:
        which: said in the title, where there are several runs: "seed 1, 2 of 3".
        about: what the runs do, said once.
        n_after: how many like it come after this run.
    """

    which: str = ""
    about: str = ""
    n_after: int = 0

    def say(self, text: str) -> None:
        """Print a line."""
        say(text)

    def on_start(self, config: Config, step: int) -> None:
        """Show the title and an empty bar; where none can be drawn, the title alone."""
        from qtdog.runs.finished import method_name

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  source {task.fields[source]}  {task.fields[rate]} images/s"),
            TimeRemainingColumn(),
        )
        title = f"{method_name(config.model_dump())}, unseen: {config.data.target}" + (
            f" ({self.which})" if self.which else ""
        )
        self._steps, self._start, self._n_images, self._shown = config.train.steps, step, 0, 0.0
        self._started = self._line = time.perf_counter()
        self._measured_from: tuple[int, float] | None = None
        self._is_estimated = False
        if not shows_bars():
            err.print(title, highlight=False, markup=False, soft_wrap=True)
        self._progress = Progress(*columns, console=err, disable=not shows_bars())
        self._progress.start()
        self._task = self._progress.add_task(
            title, total=config.train.steps, completed=step, loss="–", source="–", rate="–"
        )

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """Move the bar."""
        self._n_images += n_images
        now = time.perf_counter()
        rate = self._n_images / max(now - self._started, 1e-9)
        self._estimate(step, now)
        if now - self._shown > 0.1 or step == self._steps:
            self._shown = now
            self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", rate=f"{rate:,.0f}")
        if self._progress.disable and now - self._line > LINE_EVERY_S:
            self._line = now
            left = (now - self._started) / (step - self._start) * (self._steps - step)
            text = f"  step {step}/{self._steps}  loss {loss:.3f}  {rate:,.0f} images/s  {duration_text(left)} left"
            err.print(text, highlight=False, soft_wrap=True)

    def _estimate(self, step: int, now: float) -> None:
        """Say once, after some steps, how long the run will take; nothing of a short one."""
        if self._measured_from is None:
            self._measured_from = step, now  # the first step makes buffers, and is not counted
        first, since = self._measured_from
        if self._is_estimated or step - first < MEASURED_STEPS or now - since < MEASURED_S:
            return
        self._is_estimated = True
        step_s = (now - since) / (step - first)
        left_s = step_s * (self._steps - step)
        if left_s > WORTH_SAYING_S:
            whole = left_s + step_s * self._steps * self.n_after
            several = f", {duration_text(whole)} with the {self.n_after} after it" if self.n_after else ""
            self.say(f"  about {duration_text(left_s)} for this run{several} ({step_s:.2g} s per step)")

    def on_record(self, record: Record) -> None:
        """Show an evaluation."""
        from qtdog.report.tables import percent

        source = percent(record.seen.source_accuracy)
        self._progress.update(self._task, source=source)
        if self._progress.disable:
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
        if not shows_bars():
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


def as_frame(rows: list[dict[str, Any]], *, html: bool = False) -> Any:
    """Return rows as a pandas DataFrame where pandas is installed, else as they are; with `html` its HTML or None."""
    if importlib.util.find_spec("pandas") is None:
        return None if html else rows
    import pandas as pd

    frame = pd.DataFrame(rows)
    return frame.to_html(index=False, float_format=lambda value: f"{value:.4g}") if html else frame


def python_progress(progress: bool | RunCallback | Callable[[int, int, float], None]) -> RunCallbacks:
    """Return how runs report to a caller in Python.

    Args:
        progress: True for bars (lines where none can be drawn), False for silence, a `RunCallback`, or a function that
            is called as f(step, steps, loss) after each update.
    """
    from qtdog.training.run import RunCallbacks

    if progress is True:
        counting = CountingBar("decoding images"), _warn_in_python, CountingBar("quantizing after training")
        return RunCallbacks(_PythonBar(), *counting)
    callback = progress if isinstance(progress, RunCallback) else None
    if callback is None and progress:
        callback = _StepFunction(cast(Callable[[int, int, float], None], progress))
    return RunCallbacks(callback, warn=lambda text: warnings.warn(python_words(text), stacklevel=4))


class _PythonBar(TrainingBar):
    def say(self, text: str) -> None:
        super().say(python_words(text))


def _warn_in_python(text: str) -> None:
    warn(python_words(text))


class _StepFunction(RunCallback):
    """Calls a function after each update."""

    def __init__(self, function: Callable[[int, int, float], None]) -> None:
        self._function, self._steps = function, 0

    def on_start(self, config: Config, step: int) -> None:
        self._steps = config.train.steps

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        self._function(step, self._steps, loss)
