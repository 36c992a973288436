"""The range of each activation, measured on source images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.progress import Progress

Reader = Callable[[npt.NDArray[np.uint8]], Sequence[npt.NDArray[Any]]]
"""Images to the values of all points."""

N_BINS = 2048
LEVELS = 255
N_TRIES = 100
MEMORY_BYTES = 2**28


@dataclass(frozen=True)
class Range:
    """What one activation may be: low ≤ 0 ≤ high, so that 0 has a code of its own (padding is exact)."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """Width of a step of 8 bits."""
        return float(np.float32((self.high - self.low) / LEVELS)) or 1.0

    @property
    def zero_point(self) -> int:
        """The code of 0."""
        return round(-self.low / self.scale)


def measure_ranges(
    names: Sequence[str], read: Reader, images: npt.NDArray[np.uint8], *, progress: Progress = None
) -> dict[str, Range]:
    """Return the range of each point that rounds its values with the least squared error.

    Two passes: extremes first, then a histogram of 2,048 bins between them; of the ranges that are 1 % … 100 % of the
    extremes, the one with the least mean squared error of rounding and clipping together.

    Args:
        names: of the points.
        read: returns their values.
        images: uint8 (n, H, W, C).
        progress: called with images done and to do.
    """
    size = _batch(sum(value[0].nbytes for value in read(images[:1])))
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    lows, highs = torch.zeros(len(names)), torch.zeros(len(names))
    histograms: list[Tensor] = [torch.zeros(N_BINS) for _ in names]
    for turn, part in enumerate([*parts, *parts]):
        values = [torch.from_numpy(np.ascontiguousarray(value)).reshape(-1).float() for value in read(part)]
        for index, value in enumerate(values):
            low, high = (float(bound[index]) for bound in (lows, highs))
            if turn < len(parts):
                lows[index], highs[index] = min(low, float(value.min())), max(high, float(value.max()))
            elif low < high:
                histograms[index] += torch.histc(value, N_BINS, low, high)
        if progress is not None:
            progress(turn + 1, 2 * len(parts))
    bounds = zip(names, lows.tolist(), highs.tolist(), histograms, strict=True)
    return {name: best_range(histogram, low, high) for name, low, high, histogram in bounds}


def best_range(histogram: Tensor, low: float, high: float) -> Range:
    """Return the part of [low, high] that rounds a histogram with the least squared error.

    Example:
        >>> counts = torch.zeros(N_BINS)
        >>> counts[:1024], counts[-1] = 1000.0, 1.0  # one value far from all others
        >>> best_range(counts, 0.0, 1.0).high < 0.6
        True
    """
    if not low < high:
        return Range(low, max(high, 0.0))
    centres = torch.linspace(low, high, N_BINS + 1, dtype=torch.float64)
    centres = (centres[1:] + centres[:-1]) / 2
    weights = histogram.double()
    found = [(_error(centres, weights, low * k / N_TRIES, high * k / N_TRIES), k) for k in range(1, N_TRIES + 1)]
    part = min(found)[1] / N_TRIES
    return Range(low * part, high * part)


def _error(centres: Tensor, weights: Tensor, low: float, high: float) -> float:
    step = (high - low) / LEVELS
    clipped = centres.clamp(low, high)
    # inside a step the error is uniform: step² / 12
    return float((weights * (clipped - centres).square()).sum() + weights.sum() * step**2 / 12)


def _batch(bytes_per_image: int) -> int:
    return int(min(max(MEMORY_BYTES // max(bytes_per_image, 1), 1), 32))
