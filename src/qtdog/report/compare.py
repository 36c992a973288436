"""Two methods side by side, over the (unseen domain, trial) pairs that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.random import numpy_stream
from qtdog.report.tables import label_rows, outcomes, percent
from qtdog.report.text_tables import Cell, Sheet
from qtdog.runs.finished import NO_TARGET, FinishedRun

CONFIDENCE = 0.95
N_RESAMPLES = 9999
# with fewer pairs the exact two-sided test cannot reach p < 0.05, whatever they say: 2 / 2^5 = 0.0625
ENOUGH = 6
MAX_EXACT = 13


@dataclass(frozen=True)
class Comparison:
    """What pairs say about B minus A; differences as fractions.

    Attributes:
        selection: how checkpoints were chosen.
        pairs: (target, trial) of each difference.
        differences: accuracy of B minus that of A.
        mean: of the differences.
        low: lower end of the 95 % bootstrap interval of the mean; None for fewer than two pairs.
        high: upper end.
        p_value: of the two-sided Wilcoxon signed-rank test; None if it says nothing (no pairs, or all equal).
    """

    selection: str
    pairs: tuple[tuple[str, tuple[int, int]], ...]
    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    p_value: float | None

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.differences)

    @property
    def warning(self) -> str:
        """What the number of pairs does not allow to say; empty if there are enough.

        Example:
            >>> compare_values([0.1, 0.2], [0.2, 0.3]).warning
            'only 2 pairs: too few to tell. The test cannot give p < 0.05 before 6 pairs (here at best 0.5).'
        """
        if self.n >= ENOUGH:
            return ""
        least = f"{2 / 2**self.n:.3g}"
        count = "only 1 pair" if self.n == 1 else f"only {self.n} pairs"
        return f"{count}: too few to tell. The test cannot give p < 0.05 before {ENOUGH} pairs (here at best {least})."


def compare_values(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Return the comparison of paired accuracies.

    The interval is a percentile bootstrap of the mean difference (`scipy.stats.bootstrap`, 9,999 resamples, a named
    random stream), the test Wilcoxon's signed-rank test (exact up to 13 pairs, above `scipy.stats.wilcoxon`).
    Both take pairs for independent, while trials on one domain are alike, so that they err to the sure side.

    Args:
        first: accuracies of A.
        second: of B, in the same order.

    Raises:
        ValueError: the two are not of one length, or empty.

    Example:
        >>> found = compare_values([0.50, 0.60, 0.70], [0.52, 0.63, 0.71])
        >>> round(found.mean, 3), found.p_value
        (0.02, 0.25)
    """
    return _compare("", [("", (i, 0)) for i in range(len(first))], first, second)


def _compare(
    selection: str, pairs: Sequence[tuple[str, tuple[int, int]]], first: Sequence[float], second: Sequence[float]
) -> Comparison:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    low, high = _interval(differences)
    values = tuple(map(float, differences))
    return Comparison(selection, tuple(pairs), values, float(differences.mean()), low, high, _p_value(differences))


def _interval(differences: np.ndarray) -> tuple[float | None, float | None]:
    if len(differences) < 2:
        return None, None
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=N_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        # called rng since scipy 1.15, which takes the old name too
        random_state=numpy_stream(0, "bootstrap"),  # pyright: ignore[reportCallIssue]
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _p_value(differences: np.ndarray) -> float | None:
    # accuracies are counts over a fixed number of images: what differs by rounding only is equal
    told = np.round(differences, 12)
    told = told[told != 0]
    if not len(told):
        return None
    if len(told) <= MAX_EXACT:
        return signed_rank(told)
    found: Any = stats.wilcoxon(told)
    return float(found.pvalue)


def signed_rank(differences: np.ndarray) -> float:
    """Return the exact two-sided p of Wilcoxon's signed-rank test, also with ties: from all 2^n ways to set the signs.

    `scipy.stats.wilcoxon` gives the same, and takes seconds for a dozen differences with ties.

    Args:
        differences: none of them zero; a handful.

    Example:
        >>> signed_rank(np.array([0.2, 0.1, 0.3]))
        0.25
    """
    n = len(differences)
    ranks = stats.rankdata(np.abs(differences))
    sums = ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) @ ranks
    observed = ranks[differences > 0].sum()
    return float(min(1.0, 2 * min((sums <= observed + 1e-9).mean(), (sums >= observed - 1e-9).mean())))


def compare(
    entries: Sequence[FinishedRun],
    names: tuple[str, str],
    selection: str,
    *,
    split: str = "whole",
    pooled: bool = False,
) -> Comparison | None:
    """Return the comparison of two rows of a table; None if they have no pair under this selection.

    Args:
        entries: of one data set.
        names: labels of the rows A and B.
        selection: a name of `chosen.SELECTIONS`.
        split: `whole` or `80`.
        pooled: as in `block.make_block`.

    Raises:
        ConfigError: a label that no row has, with the nearest one.
    """
    rows = label_rows([entry for entry in entries if entry.target != NO_TARGET], pooled=pooled)
    for name in names:
        if name not in rows:
            raise ConfigError(unknown("row", name, rows))
    first, second = (outcomes(rows[name], selection, split=split, pooled=pooled) for name in names)
    pairs = [place for place in first if place in second]
    if not pairs:
        return None
    sides = ([side[place].on(split) for place in pairs] for side in (first, second))
    left, right = ([value for value in side if value is not None] for side in sides)
    return _compare(selection, pairs, left, right)


def comparison_sheet(title: str, found: Sequence[Comparison]) -> Sheet:
    """Return a table with a row per way to choose checkpoints; differences in points."""
    headers = ["selection", "pairs", "B − A (points)", "95 % interval", "Wilcoxon p", "B better in"]
    warnings = list(dict.fromkeys(one.warning for one in found if one.warning))
    about = ["Pairs of (unseen domain, trial); mean difference with its bootstrap interval, signed-rank test."]
    return Sheet(title, about + warnings, headers, [_row(one) for one in found])


def _row(one: Comparison) -> list[Cell]:
    interval = "–" if one.low is None else f"{_points(one.low)} … {_points(one.high)}"
    wins = sum(value > 0 for value in one.differences)
    p_value = "–" if one.p_value is None else f"{one.p_value:.3g}"
    texts = [one.selection, str(one.n), _points(one.mean), interval, p_value, f"{wins} of {one.n}"]
    return [Cell(text) for text in texts]


def _points(value: float | None) -> str:
    text = percent(value)
    return f"+{text}" if value is not None and value > 0 and text != "0.0" else text.replace("-", "−")
