"""Curvature as a picture: trace, largest eigenvalues, density of the spectrum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from qtdog.analysis.figures import legend, panels, plain, save, style
from qtdog.analysis.spectrum import Ritz, density

N_GRID = 400
WIDTH_FRAC = 1 / 100  # of the span of all spectra: the Gaussian that smooths
FLOOR = 0.1  # of what one eigenvalue by itself adds: below it a log axis shows numerical dust


def draw_hessian(
    numbers: Sequence[Mapping[str, Any]], densities: Mapping[str, Sequence[Ritz]], folder: Path
) -> list[str]:
    """Draw trace and eigenvalues with their errors, and the densities with a band; return the names of the files.

    Args:
        numbers: a row per run, as the table has them.
        densities: the probes of each run by its label; empty to leave the panel out.
        folder: where to.
    """
    figure, axes = panels(3 if densities else 2)
    _bars(axes[0], numbers, "trace", "standard_error")
    axes[0].set_ylabel("trace of the Hessian")
    _bars(axes[1], numbers, "top_eigenvalue", "residual")
    axes[1].set_ylabel("largest eigenvalue")
    if densities:
        _densities(axes[2], densities, numbers)
    legend(figure, axes[0])
    return save(figure, folder, "hessian")


def _bars(axis: Axes, numbers: Sequence[Mapping[str, Any]], name: str, error: str) -> None:
    for n, row in enumerate(numbers):
        look = style(n)
        axis.errorbar([n], [row[name]], yerr=[row[error]], label=plain(row["run"]), capsize=4, linestyle="none", **look)
    axis.set_xticks(range(len(numbers)), [str(n + 1) for n in range(len(numbers))])
    axis.set_xlabel("run, in the order of the legend")
    axis.set_xlim(-0.6, len(numbers) - 0.4)
    highest = max(row[name] + row[error] for row in numbers)
    axis.set_ylim(min(0.0, *(row[name] - row[error] for row in numbers), 0.0), 1.1 * max(highest, 0.0) or 1.0)
    axis.grid(alpha=0.3)


def _densities(axis: Axes, densities: Mapping[str, Sequence[Ritz]], numbers: Sequence[Mapping[str, Any]]) -> None:
    places = [value for probes in densities.values() for probe in probes for value in probe.values]
    span = max(places) - min(places) or 1.0
    grid = np.linspace(min(places) - 0.05 * span, max(places) + 0.05 * span, N_GRID)
    width = WIDTH_FRAC * span
    lowest = FLOOR / (numbers[0]["n_parameters"] * width * math.sqrt(2 * math.pi))
    highest = 0.0
    for n, (row, probes) in enumerate(zip(numbers, densities.values(), strict=True)):
        mean, error = density(probes, grid, width)
        highest = max(highest, float(mean.max()))
        colour = style(n)["color"]
        axis.plot(grid, mean, color=colour)
        axis.fill_between(
            grid, np.maximum(mean - error, lowest), np.maximum(mean + error, lowest), color=colour, alpha=0.2
        )
        found = [value for name, value in row.items() if name.startswith("eigenvalue_")]
        axis.plot(found, [lowest * 10 ** (0.25 * (n + 1))] * len(found), "|", color=colour, markersize=9, clip_on=False)
    axis.set_yscale("log")
    axis.set_ylim(lowest, 3 * highest)
    axis.set_xlabel("eigenvalue of the Hessian (strokes: the largest)")
    axis.set_ylabel("spectral density")
    axis.grid(alpha=0.3)
