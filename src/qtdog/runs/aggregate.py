"""A mean over trials and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Mean and standard error over `n` trials.

    Attributes:
        mean: None if nothing was measured.
        error: standard error; None for fewer than two values.
        n: number of values.
    """

    mean: float | None
    error: float | None
    n: int


def estimate(values: Sequence[float | None]) -> Estimate:
    """Return the mean, and its standard error as DomainBed has it: population standard deviation / √n.

    Values that are None are left out. One value says nothing about the spread, so it has no error.

    Source: the tables of Gulrajani and Lopez-Paz, ICLR 2021.

    Example:
        >>> estimate([0.5, 0.7, None])
        Estimate(mean=0.6, error=0.0707..., n=2)
        >>> estimate([])
        Estimate(mean=None, error=None, n=0)
    """
    known = [value for value in values if value is not None]
    n = len(known)
    if n == 0:
        return Estimate(None, None, 0)
    mean = math.fsum(known) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / n)
    return Estimate(mean, spread / math.sqrt(n) if n > 1 else None, n)
