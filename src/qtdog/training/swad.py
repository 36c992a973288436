"""SWAD: dense averaging through a valley of the validation loss (Cha et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from qtdog.core.errors import ConfigError
from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.training.averagers import AVERAGERS, Average, Averager, State


@AVERAGERS.register("swad")
class SWAD(Averager):
    """The mean of all updates in the valley of the source validation loss; it is saved at the end (Cha et al., 2021).

    The updates between two validations are a segment, and the loss E_i at its end is the segment's. With N_s =
    `n_converge`, N_e = `n_tolerance` and r = `tolerance`:

        start  the first i at which E_(i - N_s + 1) is the smallest of the last N_s losses; the average begins with
               segment i - N_s + 1, and the threshold is the mean of those losses times (1 + r)
        end    the first later i at which the smallest of the last N_e losses exceeds the threshold; the average ends
               with segment i - N_e. Without such an i it ends with the run.

    This is the paper's algorithm (appendix B.4), a segment for its iteration. Their code differs where it matters
    little: it may also count segments before the start whose loss is below the threshold, counts the one at the start
    twice, and leaves out what lies above the threshold at the end of a run that ends before the valley. The end of the
    valley ends the averaging, never the run. A loss that never converges gives no average: the selected checkpoint
    is saved, and the result says so. Evaluations during the run are of the weights as they are.

    The paper validates every 100 steps (VLCS 50, DomainNet 500): `train.eval_every`. Of the network's size are N_s + 1
    copies before the start and two after it, since segments above the threshold count or not all together.

    Raises:
        ConfigError: `n_tolerance` below `n_converge`.

    Example:
        >>> import torch
        >>> network, swad = nn.Linear(1, 1, bias=False), SWAD({"n_converge": 2, "n_tolerance": 2}, 0)
        >>> for step, loss in enumerate([3.0, 1.0, 2.0, 1.5, 9.0, 9.0, 1.0], start=1):
        ...     _ = network.weight.data.fill_(step)
        ...     swad.after_step(step, network)
        ...     swad.after_evaluation(step, loss)
        >>> swad.final()["weight"].item(), swad.kept(7)  # of 2, 3 and 4
        (3.0, 'average of updates 2 to 4')
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "start": HyperParameter(0, "first update that may count", low=0),
        "n_converge": HyperParameter(3, "N_s, validations that decide the start", low=1),
        "n_tolerance": HyperParameter(6, "N_e, validations above the threshold that decide the end", low=1),
        "tolerance": HyperParameter(0.3, "r, how far above the start's losses the threshold lies (VLCS 0.2)", low=0),
    }
    READS_HELDOUT: ClassVar[bool] = True

    def __init__(self, params: Mapping[str, Value], start: int) -> None:
        super().__init__(params, start)
        self.n_converge, self.n_tolerance = int(self.params["n_converge"]), int(self.params["n_tolerance"])
        if self.n_tolerance < self.n_converge:
            text = f"n_tolerance of averager 'swad' must be at least n_converge ({self.n_converge})"
            raise ConfigError(f"{text}, not {self.n_tolerance}")
        self.begin = max(int(self.params["start"]), start + 1)
        self.window: list[tuple[Average, float]] = []  # the last segments before the start, with their losses
        self.threshold: float | None = None  # None before the start
        self.valley = Average()  # the segments that count for sure
        self.pending = Average()  # behind them: the present segment and those above the threshold
        self.n_above = 0

    @property
    def ended(self) -> bool:
        """Whether the valley has ended."""
        return self.n_above == self.n_tolerance

    def after_step(self, step: int, network: nn.Module) -> None:
        """Count the weights into the present segment."""
        if step >= self.begin and not self.ended:
            self.pending.add_(step, network.state_dict())

    def after_evaluation(self, step: int, source_loss: float) -> None:
        """Close the present segment, and look for the start or the end of the valley."""
        if not self.pending.n:
            return
        if self.threshold is not None:
            self._judge(source_loss)
            return
        self.window = [*self.window, (self.pending, source_loss)][-self.n_converge :]
        self.pending = Average()
        losses = [loss for _, loss in self.window]
        if len(losses) == self.n_converge and all(losses[0] <= loss for loss in losses):
            self.threshold = sum(losses) / len(losses) * (1 + float(self.params["tolerance"]))
            segments, self.window = self.window, []
            for segment, loss in segments:
                self.pending.merge_(segment)
                self._judge(loss)

    def _judge(self, loss: float) -> None:
        assert self.threshold is not None
        if loss <= self.threshold:
            self.valley.merge_(self.pending)
            self.pending, self.n_above = Average(), 0
            return
        self.n_above += 1
        if self.ended:
            self.pending = Average()

    def evaluated(self) -> State | None:
        """The weights as they are."""
        return None

    def final(self) -> State | None:
        """Return the average, or None if the loss never converged."""
        return self._total().mean or None

    def _total(self) -> Average:
        total = Average()
        if self.threshold is not None:
            total.merge_(self.valley)
            total.merge_(self.pending)
        return total

    def kept(self, step: int) -> str:
        """Return in words what is saved."""
        if self.threshold is None:
            return f"{super().kept(step)} (the validation loss never converged, so swad averaged nothing)"
        return str(self._total())

    def state(self) -> tuple[State, dict[str, Any]]:
        """Return the segments and where the search stands."""
        averages = {"valley": self.valley, "pending": self.pending}
        averages |= {str(place): segment for place, (segment, _) in enumerate(self.window)}
        tensors = {key: value for name, one in averages.items() for key, value in one.tensors(f"{name}|").items()}
        averaged = {name: average.to_json() for name, average in averages.items()}
        losses = [loss for _, loss in self.window]
        return tensors, {"averages": averaged, "losses": losses, "threshold": self.threshold, "n_above": self.n_above}

    def restore(self, tensors: State, extra: dict[str, Any]) -> None:
        """Put back what `state` returned (KeyError if something is missing)."""
        averages = {name: Average.restored(f"{name}|", tensors, saved) for name, saved in extra["averages"].items()}
        self.valley, self.pending = averages.pop("valley"), averages.pop("pending")
        self.window = [(averages[str(place)], loss) for place, loss in enumerate(extra["losses"])]
        self.threshold, self.n_above = extra["threshold"], extra["n_above"]
