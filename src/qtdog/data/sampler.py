"""Per-domain balanced sampling with replacement; its position is the step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qtdog.core.random import numpy_stream


def draw(seed: int, step: int, domain: str, pool: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Return n members of `pool`, drawn uniformly with replacement: a pure function of (seed, step, domain).

    Nothing is remembered between steps, so that a resumed run draws what an undisturbed one would have drawn.

    Example:
        >>> draw(0, 7, "photo", np.array([3, 5]), 4).shape
        (4,)
    """
    return pool[numpy_stream(seed, "sample", domain, step).integers(len(pool), size=n)]
