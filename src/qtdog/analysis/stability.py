"""How steady accuracy is over a run, and how far the sources tell what the target will say: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy.stats import kendalltau, rankdata, spearmanr

from qtdog.runs.record import Record

N_BOOTSTRAP = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Stability:
    """What the evaluations of one run say.

    Attributes:
        n_checkpoints: evaluations that could have been shipped.
        source_std: standard deviation of the source accuracy over them.
        target_std: of the target accuracy.
        largest_drop: of the target accuracy from one evaluation to the next.
        spearman: rank correlation of source-validation and target accuracy; None where one of them never changes, or
            with fewer than three.
        spearman_low, spearman_high: 95 % interval, from resampling the evaluations.
        kendall: Kendall's τ_b of the same.
        selected: target accuracy where the source accuracy is highest (training-domain validation).
        best: highest target accuracy: what an oracle would ship.
    """

    n_checkpoints: int
    source_std: float
    target_std: float
    largest_drop: float
    spearman: float | None
    spearman_low: float | None
    spearman_high: float | None
    kendall: float | None
    selected: float
    best: float


def stability(records: Sequence[Record], rng: np.random.Generator) -> Stability | None:
    """Return what the selectable evaluations of a run say; None without a target or with fewer than two of them.

    Neighbouring checkpoints are alike, so they are fewer independent observations than they are rows, and the interval
    is too narrow rather than too wide.

    Args:
        records: of a run, in order.
        rng: draws the resamples.
    """
    pairs = [
        (record.seen.source_accuracy, record.test_accuracy)
        for record in records
        if record.seen.selectable and record.test_accuracy is not None
    ]
    if len(pairs) < 2:
        return None
    source, target = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    low, high = interval(source, target, rng)
    return Stability(
        n_checkpoints=len(pairs),
        source_std=float(source.std(ddof=1)),
        target_std=float(target.std(ddof=1)),
        largest_drop=float(max(0.0, -np.diff(target).min())),
        spearman=rank_correlation(source, target),
        spearman_low=low,
        spearman_high=high,
        kendall=_known(cast(Any, kendalltau(source, target)).statistic) if _varied(source, target) else None,
        selected=float(target[source.argmax()]),
        best=float(target.max()),
    )


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Return Spearman's ρ; None if one side never changes or there are fewer than three values.

    Example:
        >>> round(rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0, 90.0])), 6)
        1.0
    """
    return _known(cast(Any, spearmanr(one, other)).statistic) if _varied(one, other) else None


def interval(one: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[float | None, float | None]:
    """Return a 95 % interval of Spearman's ρ from resampled pairs; (None, None) where it cannot be had.

    Example:
        >>> low, high = interval(np.arange(9.0), np.arange(9.0), np.random.Generator(np.random.Philox(0)))
        >>> round(low, 6), round(high, 6)
        (1.0, 1.0)
    """
    if not _varied(one, other):
        return None, None
    drawn = rng.integers(len(one), size=(N_BOOTSTRAP, len(one)))
    ranks = [rankdata(side[drawn], axis=1) for side in (one, other)]
    centred = [rank - rank.mean(1, keepdims=True) for rank in ranks]
    lengths = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    found = (centred[0] * centred[1]).sum(1)[lengths > 0] / lengths[lengths > 0]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _varied(one: np.ndarray, other: np.ndarray) -> bool:
    return len(one) > 2 and len(np.unique(one)) > 1 and len(np.unique(other)) > 1


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
