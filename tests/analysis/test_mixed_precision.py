import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtdog.analysis.mixed_precision import assign_bits, average_bits
from qtdog.core.errors import ConfigError


def total(costs: np.ndarray, bits, candidates) -> float:
    return sum(row[candidates.index(b)] for row, b in zip(costs, bits, strict=True))


def brute_force(costs: np.ndarray, n_weights, candidates, budget: float) -> float:
    """The smallest cost over all assignments within the budget."""
    every = itertools.product(candidates, repeat=len(n_weights))
    allowed = [bits for bits in every if average_bits(bits, n_weights) <= budget + 1e-9]
    return min(total(costs, bits, candidates) for bits in allowed)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_equal_to_brute_force(data):
    candidates = data.draw(st.lists(st.integers(2, 8), min_size=1, max_size=4, unique=True))
    n_layers = data.draw(st.integers(1, 5))
    n_weights = data.draw(st.lists(st.integers(1, 5000), min_size=n_layers, max_size=n_layers))
    exponents = st.floats(-6, 3)
    rows = st.lists(exponents, min_size=len(candidates), max_size=len(candidates))
    costs = 10.0 ** np.array(data.draw(st.lists(rows, min_size=n_layers, max_size=n_layers)))
    budget = data.draw(st.floats(min(candidates), max(candidates)))
    bits = assign_bits(costs, n_weights, candidates, budget)
    assert average_bits(bits, n_weights) <= budget + 1e-9
    assert total(costs, bits, candidates) == pytest.approx(brute_force(costs, n_weights, candidates, budget), rel=1e-6)


def test_the_budget_is_kept_to_the_last_bit_in_large_layers():
    n_weights = [2_359_296, 2_359_297, 1_048_576]
    costs = np.array([[1.0, 0.0], [1.0, 0.0], [1e-3, 0.0]])
    exact = average_bits([8, 4, 8], n_weights)
    assert assign_bits(costs, n_weights, [4, 8], exact) in ([8, 4, 8], [4, 8, 8])
    just_below = exact - 1e-6
    bits = assign_bits(costs, n_weights, [4, 8], just_below)
    assert average_bits(bits, n_weights) <= just_below


def test_a_network_of_many_layers_is_solved():
    rng = np.random.default_rng(0)
    n_weights = (rng.integers(1, 2000, 160) * 64).tolist()
    candidates = [4, 5, 6, 7, 8]
    costs = rng.lognormal(0, 3, 160)[:, None] * 2.0 ** -np.array(candidates)
    bits = assign_bits(costs, n_weights, candidates, 5.5)
    assert 5.4 < average_bits(bits, n_weights) <= 5.5
    assert total(costs, bits, candidates) < costs[:, 1].sum()  # better than 5 bits everywhere


def test_bits_that_cost_nothing_are_not_spent():
    assert assign_bits(np.zeros((3, 2)), [5, 5, 5], [8, 4], 8.0) == [4, 4, 4]
    assert assign_bits(np.array([[2.0, 2.0, 1.0]]), [7], [6, 4, 8], 6.0) == [4]


def test_a_budget_that_cannot_be_kept_is_refused():
    with pytest.raises(ConfigError, match=r"3\.5 bits per weight is below the smallest candidate, 4"):
        assign_bits(np.ones((1, 2)), [3], [4, 8], 3.5)
