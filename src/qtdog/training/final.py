"""From the end of training to the network that ships, and what it measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qtdog.training.parts import Parts
from qtdog.training.records import Record
from qtdog.training.select import select
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


def final_network_(parts: Parts, state: RunState) -> Final:
    """Give the network the weights that ship, and return what they measure.

    That is the selected checkpoint, or what the averager insists on. Every process calls this.
    """
    step = select(parts.config.train.selection, state.records)
    assert step is not None  # the last step is always evaluated, and selectable
    averaged = parts.averager.final()
    weights = state.selected if averaged is None else averaged
    assert weights is not None
    parts.network.load_state_dict(weights)
    parts.network.eval()
    if averaged is None:
        return Final(next(record for record in state.records if record.seen.step == step))
    return Final(parts.evaluate(state.step, True, None, lambda: None))
