"""The watch over a quantized run: warnings by layer, and a stop when the network has collapsed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qtdog.conversion.inspect import LayerHealth
from qtdog.core.config import Config
from qtdog.core.errors import CollapseError
from qtdog.runs.record import SourceRecord

MAX_WARNED = 5  # layers named one by one; the others are counted
# At chance: not above the best constant answer by more than this share of it …
CHANCE_MARGIN = 0.05
# … and a fall: the network had been at least this share of the way from chance to perfect.
FALL_FRAC = 0.25


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
        """Warn of ill layers, and stop a run that has collapsed.

        Args:
            layers: the grids now; empty before quantization begins.
            records: every evaluation so far.

        Raises:
            CollapseError: source accuracy fell to chance after quantization began.
        """
        if not layers:
            return
        self._warn(layers)
        now, best = records[-1], max(records, key=lambda record: record.source_accuracy)
        at_chance = now.source_accuracy <= self.chance * (1 + CHANCE_MARGIN)
        rise = best.source_accuracy - self.chance
        had_learned = rise > 0 and rise >= FALL_FRAC * (1 - self.chance)
        if at_chance and had_learned:
            report = _report(layers, now, best, self.chance)
            raise CollapseError(_diagnosis(self.config, layers, now, best), report)

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
