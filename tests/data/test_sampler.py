from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtdog.data.loader import cumulated, draw

POOL = np.arange(100, 150)


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(1, 64))
def test_draws_are_members_of_the_pool_and_repeatable(seed: int, step: int, n: int) -> None:
    first = draw(seed, step, "photo", POOL, n)
    draw(seed, step + 1, "photo", POOL, n)  # nothing is remembered in between
    assert np.array_equal(first, draw(seed, step, "photo", POOL, n))
    assert len(first) == n
    assert set(first.tolist()) <= set(POOL.tolist())


def test_seed_step_and_domain_each_change_the_draw() -> None:
    draws = [draw(seed, step, name, POOL, 32).tolist() for seed in (0, 1) for step in (0, 1) for name in ("a", "b")]
    assert len({tuple(values) for values in draws}) == 8


def test_it_is_uniform_with_replacement() -> None:
    counts = np.bincount(draw(0, 0, "a", np.arange(50), 50_000), minlength=50)
    assert np.all(np.abs(counts - 1000) < 6 * np.sqrt(1000))
    assert len(set(draw(0, 0, "a", np.arange(3), 10).tolist())) <= 3


@pytest.mark.parametrize(("how", "share"), [("balanced", 1 / 2), ("sqrt", 1 / 4)])
def test_rare_classes_are_drawn_more_often(how: Any, share: float) -> None:
    labels = np.array([0] * 90 + [1] * 10)
    drawn = draw(0, 0, "a", np.arange(100), 40_000, weights=cumulated(labels, how))
    assert abs((labels[drawn] == 1).mean() - share) < 0.01
    within = np.bincount(drawn[labels[drawn] == 1] - 90)
    assert within.min() / within.max() > 0.7


def test_weights_of_equal_classes_are_no_weights() -> None:
    assert np.allclose(np.diff(cumulated(np.array([0, 1, 0, 1]), "balanced"), prepend=0), 1 / 4)
