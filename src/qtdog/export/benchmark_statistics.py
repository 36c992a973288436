"""What interleaved latencies say: percentiles of each model, and its ratio to the first one, with spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Turn:
    """Calls of one model, one after another.

    Attributes:
        seconds: wall time of each call.
        cpu_s: processor time of all of them together, all threads of the model's process.
    """

    seconds: tuple[float, ...]
    cpu_s: float

    @property
    def mean_s(self) -> float:
        """Wall time of a call.

        The mean, not the median: on a busy machine a short call may run between two interruptions and a long one
        cannot, so that medians would favour the short one.
        """
        return sum(self.seconds) / len(self.seconds)

    @property
    def mean_cpu_s(self) -> float:
        """Processor time of a call."""
        return self.cpu_s / len(self.seconds)


@dataclass(frozen=True)
class Spread:
    """Ratios of one model to another, one of each round.

    Attributes:
        median: of them.
        low: first quartile.
        high: third quartile.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Latencies of one model, over all rounds.

    Attributes:
        p50_s: median of a call.
        p95_s: 95 of 100 calls took at most that.
        images_per_s: images of all calls over their time.
        cpu_s: processor time of a call, median over rounds.
        ratio: wall time of a call ÷ that of the first model in the same round.
        cpu_ratio: the same of processor time; with one thread hardly touched by what else the machine does.
        n_calls: how many were timed.
        n_rounds: in how many rounds.
        round_s: mean wall time of a call, of each round: from these any other ratio can be made.
        round_cpu_s: the same of processor time.
    """

    p50_s: float
    p95_s: float
    images_per_s: float
    cpu_s: float
    ratio: Spread
    cpu_ratio: Spread
    n_calls: int
    n_rounds: int
    round_s: tuple[float, ...]
    round_cpu_s: tuple[float, ...]


def summarise(turns: Sequence[Turn], first: Sequence[Turn], batch: int) -> Timing:
    """Return what the calls of one model say.

    Ratios are made within a round, whose turns follow one another: what slows the whole machine cancels.

    Args:
        turns: of the model, one of each round.
        first: of the model that others are compared with.
        batch: images per call.

    Example:
        >>> ours, base = [Turn((0.2, 0.2), 0.4), Turn((0.4,), 0.4)], [Turn((0.1,), 0.1), Turn((0.2,), 0.1)]
        >>> timing = summarise(ours, base, 1)
        >>> timing.ratio, timing.cpu_ratio.median, timing.n_calls
        (Spread(median=2.0, low=2.0, high=2.0), 3.0, 3)
    """
    calls = np.concatenate([turn.seconds for turn in turns])
    pairs = list(zip(turns, first, strict=True))
    return Timing(
        p50_s=float(np.median(calls)),
        p95_s=float(np.quantile(calls, 0.95)),
        images_per_s=float(batch * calls.size / calls.sum()),
        cpu_s=float(np.median([turn.mean_cpu_s for turn in turns])),
        ratio=ratio_spread([ours.mean_s / base.mean_s for ours, base in pairs]),
        cpu_ratio=ratio_spread([ours.mean_cpu_s / base.mean_cpu_s for ours, base in pairs]),
        n_calls=int(calls.size),
        n_rounds=len(turns),
        round_s=tuple(turn.mean_s for turn in turns),
        round_cpu_s=tuple(turn.mean_cpu_s for turn in turns),
    )


def ratio_spread(ratios: Sequence[float]) -> Spread:
    """Return median and quartiles.

    Example:
        >>> ratio_spread([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
    """
    low, median, high = (float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return Spread(median, low, high)


def pareto(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Return the positions that nothing else beats in one of two numbers without losing in the other, by cost.

    Both are better when smaller.

    Example:
        >>> pareto([1.0, 2.0, 3.0, 2.5], [0.5, 0.3, 0.4, 0.3])
        [0, 1]
    """
    best: list[int] = []
    for place in sorted(range(len(costs)), key=lambda index: (costs[index], losses[index])):
        if not best or losses[place] < losses[best[-1]]:
            best.append(place)
    return best
