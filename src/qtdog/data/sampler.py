"""Per-domain balanced sampling with replacement; its position is the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.random import numpy_stream


def draw(
    seed: int,
    step: int,
    domain: str,
    pool: npt.NDArray[np.int64],
    n: int,
    *,
    weights: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """Return n members of `pool`, drawn with replacement: a pure function of (seed, step, domain).

    Nothing is remembered between steps, so that a resumed run draws what an undisturbed one would have drawn.

    Args:
        seed: of the run.
        step: which draw it is.
        domain: of which domain.
        pool: dataset indices.
        n: how many.
        weights: cumulated probabilities of the members (`cumulated`); default: all alike.

    Example:
        >>> draw(0, 7, "photo", np.array([3, 5]), 4).shape
        (4,)
    """
    stream = numpy_stream(seed, "sample", domain, step)
    if weights is None:
        return pool[stream.integers(len(pool), size=n)]
    return pool[np.searchsorted(weights, stream.random(n), side="right").clip(max=len(pool) - 1)]


def cumulated(labels: npt.NDArray[np.integer], how: Literal["sqrt", "balanced"]) -> npt.NDArray[np.float64]:
    """Return cumulated probabilities with which images of a domain are drawn, so that rare classes come more often.

    Formula: p(image) ∝ n_c^(−a) with n_c images of its class in the domain; a = 1 ("balanced": every class is drawn
    equally often) or 1/2 ("sqrt": class c is drawn in proportion to √n_c). In expectation this weighs the loss of each
    image alike, with any objective.

    Args:
        labels: class of each image of the pool (n,).
        how: "sqrt" or "balanced".

    Example:
        >>> cumulated(np.array([0, 0, 0, 1]), "balanced").round(3).tolist()
        [0.167, 0.333, 0.5, 1.0]
    """
    counts = np.bincount(labels)[labels]
    weights = counts ** (-1.0 if how == "balanced" else -0.5)
    return np.cumsum(weights / weights.sum())


def batch_sizes(domains: Sequence[str], batch_size: int, focus: str = "") -> tuple[int, ...]:
    """Return the images per domain of one step: equal shares, or half for `focus` and equal shares of the rest.

    Raises:
        ConfigError: `focus` is none of the domains, or there is no other, or nothing is left for the others.

    Example:
        >>> batch_sizes(("art", "cartoon", "photo"), 32, focus="photo")
        (24, 24, 48)
    """
    if not focus:
        return (batch_size,) * len(domains)
    if focus not in domains:
        raise ConfigError(unknown("source domain for data.focus", focus, list(domains)))
    other = len(domains) * batch_size // (2 * max(len(domains) - 1, 1))
    if len(domains) == 1 or other == 0:
        raise ConfigError("data.focus shares each batch with other domains: it takes two or more, and a larger batch")
    return tuple(len(domains) * batch_size - other * (len(domains) - 1) if d == focus else other for d in domains)
