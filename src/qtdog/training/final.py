"""From the end of training to the network that ships, and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from qtdog.core.progress import Progress
from qtdog.quantizers.registry import works_after_training
from qtdog.runs.record import Record
from qtdog.runs.selection import select
from qtdog.training.after_training import quantize_after_training_
from qtdog.training.batch_norm import fit_batch_norm_
from qtdog.training.parts import Parts
from qtdog.training.state import RunState


@dataclass(frozen=True)
class Final:
    """What is known of the network that ships.

    Attributes:
        record: its evaluation.
        extra: what the result says besides, by key of `result.json`.
    """

    record: Record
    extra: dict[str, Any] = field(default_factory=dict)


def final_network_(
    parts: Parts, state: RunState, *, check: Callable[[], None] = lambda: None, progress: Progress = None
) -> Final:
    """Give the network the weights that ship, and return what they measure.

    That is the selected checkpoint, or what the averager insists on; quantized now if the quantizer works after
    training. Every process calls this.

    Args:
        parts: of the run.
        state: the end of training.
        check: called often while it lasts; may raise to break off.
        progress: told (done, total) of quantization after training.

    Raises:
        ConfigError, ModelError: as in `training.after_training.quantize_after_training_`.
    """
    step = select(parts.config.train.selection, state.records)
    assert step is not None  # the last step is always evaluated, and selectable
    averaged = parts.averager.final()
    if averaged is None:
        assert state.selected is not None
        parts.network.load_state_dict(state.selected)
        record = next(record for record in state.records if record.seen.step == step)
    else:
        parts.network.load_state_dict(averaged, strict=False)  # what is not averaged stays that of the last update
        fit_batch_norm_(parts)
        record = parts.evaluate(state.step, True, None, check)
    parts.network.eval()
    kept = {"kept": parts.averager.kept(step), "trained_on_heldout": parts.config.data.train_on_heldout}
    if not works_after_training(parts.config.quantizer.name):
        return Final(record, kept)
    report = quantize_after_training_(parts, check, progress)
    after = parts.evaluate(record.seen.step, True, None, check)
    return Final(after, kept | _of_quantized(parts, record, report, after))


def _of_quantized(parts: Parts, before: Record, report: dict[str, Any], after: Record) -> dict[str, Any]:
    """Return what the result says of a network quantized after training: only the one that was chosen was."""
    float_network = _accuracies(before) | {"source": asdict(before.seen)["source"]}
    chosen = {parts.config.train.selection: {"step": after.seen.step} | _accuracies(after)}
    return {"after_training": report | {"float": float_network}, "by_selection": chosen}


def _accuracies(record: Record) -> dict[str, float | None]:
    return {"source_accuracy": record.seen.source_accuracy, "test_accuracy": record.test_accuracy}
