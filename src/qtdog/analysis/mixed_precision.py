"""Bits per layer under a budget: an exact multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp

from qtdog.core.errors import ConfigError


def assign_bits(
    costs: npt.NDArray[np.floating], n_weights: Sequence[int], candidates: Sequence[int], budget: float
) -> list[int]:
    """Return the bits of each layer that minimise the sum of the costs, with at most `budget` bits per weight.

    With x_lb = 1 if layer l gets b bits:

        minimise Σ_lb x_lb · costs[l, b]   so that   Σ_b x_lb = 1,   Σ_lb x_lb · n_l · b ≤ budget · Σ_l n_l

    solved exactly as an integer program (HiGHS through SciPy). Where fewer bits cost no more, they are taken.

    Args:
        costs: (layers, candidates), finite.
        n_weights: weights of each layer.
        candidates: bit-widths, in the order of the columns.
        budget: bits per weight, averaged over all weights.

    Raises:
        ConfigError: the budget is below the smallest candidate.

    Example:
        >>> costs = np.array([[9.0, 1.0], [2.0, 1.5]])  # the first layer suffers more from 4 bits
        >>> assign_bits(costs, [100, 100], [4, 8], 6.0)
        [8, 4]
    """
    fewest = min(candidates)
    if budget < fewest:
        raise ConfigError(f"a budget of {budget:g} bits per weight is below the smallest candidate, {fewest} bits")
    n_layers, n_candidates = costs.shape
    unit = math.gcd(*n_weights)
    sizes = np.array(n_weights, dtype=np.float64) / unit
    # Sums of whole numbers: with half a unit to spare the solver's tolerance cannot let a wrong one in.
    room = math.floor(budget * sizes.sum() + 1e-9) + 0.5
    bits = np.array(candidates, dtype=np.float64)
    one_each = np.kron(np.eye(n_layers), np.ones(n_candidates))
    largest = float(np.abs(costs).max()) or 1.0
    result = milp(
        costs.reshape(-1) * (1e4 / largest),  # so that the solver's absolute gap is small beside every cost that counts
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.kron(sizes, bits)[None], -np.inf, room)],
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the integer program has no solution, though one exists: {result.message}")
    chosen = result.x.reshape(costs.shape).argmax(axis=1)
    return [_fewest(row, row[place], candidates) for row, place in zip(costs, chosen, strict=True)]


def _fewest(row: npt.NDArray[np.floating], cost: float, candidates: Sequence[int]) -> int:
    return min(bits for bits, other in zip(candidates, row, strict=True) if other <= cost)


def average_bits(bits: Sequence[int], n_weights: Sequence[int]) -> float:
    """Return bits per weight, averaged over all weights.

    Example:
        >>> average_bits([8, 4], [100, 300])
        5.0
    """
    return sum(b * n for b, n in zip(bits, n_weights, strict=True)) / sum(n_weights)
