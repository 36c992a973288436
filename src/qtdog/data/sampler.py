"""Per-domain balanced sampling with replacement; its position is the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.random import numpy_stream


def draw(seed: int, step: int, domain: str, pool: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Return n members of `pool`, drawn uniformly with replacement: a pure function of (seed, step, domain).

    Nothing is remembered between steps, so that a resumed run draws what an undisturbed one would have drawn.

    Example:
        >>> draw(0, 7, "photo", np.array([3, 5]), 4).shape
        (4,)
    """
    return pool[numpy_stream(seed, "sample", domain, step).integers(len(pool), size=n)]


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
