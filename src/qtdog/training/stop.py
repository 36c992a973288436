"""What ends a run before its last step: a signal that asks for it, or the watch that finds the network collapsed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from qtdog.conversion.inspect import LayerHealth
from qtdog.core.config import Config
from qtdog.core.errors import CollapseError, Interrupted
from qtdog.runs.record import SourceRecord


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


MAX_WARNED = 5  # layers named one by one; the others are counted
# At chance: not above the best constant answer by more than this share of it …
CHANCE_MARGIN = 0.05
# … and a fall: the network had been at least this share of the way from chance to perfect.
FALL_FRAC = 0.25
# Nothing learned: above the best constant answer by less than this share of it, and of the way from it to perfect.
LITTLE_OF_CHANCE, LITTLE_OF_WAY = 0.5, 0.1
MIN_LEARNING_STEPS = 50  # of fewer nobody expects a network


def chance_accuracy(class_index: np.ndarray, parts: Sequence[np.ndarray], n_classes: int) -> float:
    """Return the highest mean accuracy over the domains that one constant answer can have.

    Args:
        class_index: class of each image of the data set (n,).
        parts: dataset indices of the held-out images, one array per domain.
        n_classes: number of classes.

    Example:
        >>> chance_accuracy(np.array([0, 0, 1, 1]), [np.array([0, 2]), np.array([1])], 2)
        0.75
    """
    shares = [np.bincount(class_index[part], minlength=n_classes) / len(part) for part in parts]
    return float(np.mean(shares, axis=0).max())


@dataclass
class HealthWatch:
    """Looks at the grids and at source accuracy at each evaluation.

    Attributes:
        config: of the run.
        chance: accuracy of the best constant answer.
        warn: is called, once for each layer, with what is wrong with it.
        warned: names of the layers that were warned of.
    """

    config: Config
    chance: float
    warn: Callable[[str], None]
    warned: set[str] = field(default_factory=set)

    def __call__(self, layers: Sequence[LayerHealth], records: Sequence[SourceRecord]) -> None:
        """Warn of ill layers and of a run that ends without having learned, and stop one that has collapsed.

        Args:
            layers: the grids now; empty before quantization begins.
            records: every evaluation so far.

        Raises:
            CollapseError: source accuracy fell to chance after quantization began.
        """
        now, best = records[-1], max(records, key=lambda record: record.source_accuracy)
        if now.step == self.config.train.steps >= MIN_LEARNING_STEPS:
            self._warn_of_nothing_learned(best)
        if not layers:
            return
        self._warn(layers)
        at_chance = now.source_accuracy <= self.chance * (1 + CHANCE_MARGIN)
        rise = best.source_accuracy - self.chance
        had_learned = rise > 0 and rise >= FALL_FRAC * (1 - self.chance)
        if at_chance and had_learned:
            report = _report(layers, now, best, self.chance)
            raise CollapseError(_diagnosis(self.config, layers, now, best), report)

    def _warn_of_nothing_learned(self, best: SourceRecord) -> None:
        little = min(LITTLE_OF_CHANCE * self.chance, LITTLE_OF_WAY * (1 - self.chance))
        if best.source_accuracy < self.chance + little:
            self.warn(
                f"the network learned next to nothing: at best {best.source_accuracy:.1%} of the sources' held-out "
                f"images are right, and the same answer for all of them is right in {self.chance:.1%}. Try a lower "
                f"learning rate (--lr {self.config.optimizer.lr / 5:g}; it was {self.config.optimizer.lr:g}) or "
                f"train longer (--steps {2 * self.config.train.steps}; it was {self.config.train.steps})"
            )

    def _warn(self, layers: Sequence[LayerHealth]) -> None:
        ill = [layer for layer in layers if layer.problems and layer.name not in self.warned]
        for layer in ill[:MAX_WARNED]:
            self.warn(f"quantized layer '{layer.name}': {'; '.join(layer.problems)}")
        if len(ill) > MAX_WARNED:
            self.warn(f"and {len(ill) - MAX_WARNED} more quantized layers like these")
        self.warned.update(layer.name for layer in ill)


def _diagnosis(config: Config, layers: Sequence[LayerHealth], now: SourceRecord, best: SourceRecord) -> str:
    text = (
        f"the network collapsed: accuracy on the sources' held-out images fell from {best.source_accuracy:.1%} at step "
        f"{best.step} to {now.source_accuracy:.1%} at step {now.step}, which is chance; quantization began at step "
        f"{config.start_step}."
    )
    ill = sorted((layer for layer in layers if layer.problems), key=lambda layer: -layer.clipped_frac)
    if ill:
        text += f" {len(ill)} of {len(layers)} quantized layers are ill; '{ill[0].name}': {'; '.join(ill[0].problems)}."
    return f"{text} {_advice(config)}"


def _advice(config: Config) -> str:
    quantizer = config.quantizer
    if quantizer.step_mode == "raw" and config.optimizer.name == "adam":
        return (
            "Adam cancels LSQ's gradient scale, so that a raw step size moves by the learning rate at every step, many "
            "times too fast. Learn it on a log scale (--set quantizer.step_mode=log), or use --set optimizer.name=sgd."
        )
    rate = config.optimizer.lr
    return (
        f"Use more bits (--bits {min(quantizer.bits + 1, 8)}; it was {quantizer.bits}), a lower learning rate "
        f"(--lr {rate / 5:g}), or leave sensitive layers in float (--set quantizer.exclude=[classifier, LAYER])."
    )


def _report(layers: Sequence[LayerHealth], now: SourceRecord, best: SourceRecord, chance: float) -> dict[str, Any]:
    return {
        "step": now.step,
        "source_accuracy": now.source_accuracy,
        "best_step": best.step,
        "best_source_accuracy": best.source_accuracy,
        "chance_accuracy": chance,
        "layers": [asdict(layer) | {"problems": layer.problems} for layer in layers],
    }
