"""Where a run stands: what the loop changes besides weights, and how it goes into a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qtdog.runs.record import Record

SAVED = ("evaluated_step", "lines", "loss_sum", "loss_n", "trained_s", "forked_from")


@dataclass
class RunState:
    """The mutable state of the loop.

    Attributes:
        step: updates made so far; the position of every random stream.
        evaluated_step: the step of the last evaluation.
        saved_step: the step of the last checkpoint.
        lines: every evaluation so far, as in `metrics.jsonl`.
        loss_sum: of the training losses since the last evaluation, over `loss_n` steps.
        trained_s: wall-clock seconds of training so far, over all sittings; of a fork, those since the fork.
        forked_from: step and seed of the float run that this one began from; None if it began itself.
        selected: state of the network at the checkpoint that selection prefers so far.
    """

    step: int = 0
    evaluated_step: int = 0
    saved_step: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_n: int = 0
    trained_s: float = 0.0
    forked_from: dict[str, int] | None = None
    selected: dict[str, Tensor] | None = None

    @property
    def records(self) -> list[Record]:
        """The evaluations so far."""
        return [Record.from_json(line) for line in self.lines]

    def add_loss(self, loss: float) -> None:
        """Count one step's training loss."""
        self.loss_sum += loss
        self.loss_n += 1

    @property
    def mean_loss(self) -> float | None:
        """Mean training loss since the last evaluation; None without a step between."""
        return self.loss_sum / self.loss_n if self.loss_n else None

    def add_line(self, line: dict[str, Any]) -> None:
        """Keep one evaluation of the present step and start counting the training loss anew."""
        self.lines.append(line)
        self.evaluated_step = self.step
        self.loss_sum, self.loss_n = 0.0, 0

    def to_json(self) -> dict[str, Any]:
        """Return what goes into a checkpoint's JSON."""
        return {name: getattr(self, name) for name in SAVED}

    @classmethod
    def from_json(cls, step: int, saved: dict[str, Any]) -> RunState:
        """Return the state that `to_json` described."""
        return cls(step=step, saved_step=step, **{name: saved[name] for name in SAVED if name in saved})
