"""Stability and rank correlation of made-up runs."""

import numpy as np
import pytest

from qtdog.analysis.stability import interval, rank_correlation, stability
from qtdog.runs.record import Record, Score, SourceRecord

RNG = np.random.Generator(np.random.Philox(0))


def record(step: int, source: float, target: float | None, *, selectable: bool = True) -> Record:
    seen = SourceRecord(step, selectable, {"a": Score(source, 1.0, 10)})
    return Record(seen, {} if target is None else {"t": Score(target, 1.0, 10)}, {}, None)


def test_only_what_could_be_shipped_counts():
    early = [record(1, 0.1, 0.9, selectable=False)]
    late = [record(k + 2, 0.5 + 0.01 * k, 0.4 + 0.02 * k) for k in range(6)]
    found = stability([*early, *late], RNG)
    assert found is not None
    assert found.n_checkpoints == 6
    assert (found.spearman, found.kendall) == pytest.approx((1, 1))
    assert found.largest_drop == 0
    assert found.selected == found.best == pytest.approx(0.5)


def test_drops_and_misled_selection_are_seen():
    pairs = [(0.5, 0.6), (0.6, 0.7), (0.7, 0.4), (0.8, 0.5)]
    found = stability([record(k, *pair) for k, pair in enumerate(pairs)], RNG)
    assert found is not None
    assert found.largest_drop == pytest.approx(0.3)
    assert (found.selected, found.best) == (0.5, 0.7)
    assert found.spearman is not None
    assert found.spearman < 0


def test_without_a_target_or_with_one_checkpoint_there_is_nothing_to_say():
    assert stability([record(1, 0.5, None), record(2, 0.6, None)], RNG) is None
    assert stability([record(1, 0.5, 0.5)], RNG) is None


def test_what_never_changes_has_no_rank_correlation():
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.ones(3)) is None
    assert interval(np.array([1.0, 2.0, 3.0]), np.ones(3), RNG) == (None, None)


def test_the_interval_is_that_of_spearman_on_each_resample():
    one, other = np.array([1.0, 2.0, 2.0, 4.0, 5.0]), np.array([2.0, 1.0, 3.0, 3.0, 9.0])
    low, high = interval(one, other, np.random.Generator(np.random.Philox(1)))
    drawn = np.random.Generator(np.random.Philox(1)).integers(5, size=(1000, 5))[:80]
    expected = [rho for row in drawn if (rho := rank_correlation(one[row], other[row])) is not None]
    assert low == pytest.approx(np.quantile(expected, 0.025), abs=0.35)
    assert high == pytest.approx(np.quantile(expected, 0.975), abs=0.1)


def test_the_interval_holds_zero_for_unrelated_numbers():
    drawn = np.random.Generator(np.random.Philox(3))
    low, high = interval(drawn.random(40), drawn.random(40), drawn)
    assert low is not None
    assert high is not None
    assert low < 0 < high
