"""Loss surfaces as pictures: a curve for a line, contours for a plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtdog.analysis.figures import legend, panels, plain, save, style

N_LEVELS = 15
ROLES = {"sources": "sources (held-out images)", "target": "target (unseen domain)"}
FILTER_SHARE = "share of filter length"


def draw_surface(numbers: Sequence[Mapping[str, Any]], labels: Sequence[str], folder: Path) -> list[str]:
    """Draw the loss of sources and target over one coordinate or two; return the names of the files.

    Args:
        numbers: rows with `x`, `y` and a loss for each role.
        labels: of the one run at the origin, or of the two at x = 0 and 1.
        folder: where to.
    """
    roles = [role for role in ROLES if role in numbers[0]]
    if len({row["y"] for row in numbers}) == 1:
        figure, axes = panels(1, width=5.6)
        _line(axes[0], numbers, roles, labels)
        legend(figure, axes[0])
    else:
        figure, axes = panels(len(roles))
        for axis, role in zip(axes, roles, strict=True):
            _plane(figure, axis, numbers, role, labels)
        legend(figure, axes[0])
    return save(figure, folder, "surface")


def _line(axis: Axes, numbers: Sequence[Mapping[str, Any]], roles: Sequence[str], labels: Sequence[str]) -> None:
    for n, role in enumerate(roles):
        axis.plot([row["x"] for row in numbers], [row[role] for row in numbers], label=ROLES[role], **style(n))
    for place, label in enumerate(labels):
        axis.axvline(place, color="#666666", linestyle=":" if place == 0 else "--", label=plain(label))
    axis.set_xlabel(_xlabel(labels))
    axis.set_ylabel("cross-entropy (nats)")
    axis.grid(alpha=0.3)


def _xlabel(labels: Sequence[str]) -> str:
    return f"random direction ({FILTER_SHARE})" if len(labels) == 1 else "from the first run (0) to the second (1)"


def _plane(figure: Figure, axis: Axes, numbers: Sequence[Mapping[str, Any]], role: str, labels: Sequence[str]) -> None:
    xs, ys = (sorted({row[name] for row in numbers}) for name in ("x", "y"))
    found = {(row["x"], row["y"]): row[role] for row in numbers}
    heights = np.array([[found.get((x, y), np.nan) for x in xs] for y in ys])
    drawn = axis.contourf(xs, ys, np.ma.masked_invalid(heights), levels=N_LEVELS, cmap="viridis")
    figure.colorbar(drawn, ax=axis, label="cross-entropy (nats)")
    for place, label in enumerate(labels):
        axis.plot([place], [0], linestyle="none", markeredgecolor="white", label=plain(label), **style(place + 1))
    axis.set_title(ROLES[role])
    axis.set_xlabel(_xlabel(labels))
    share = "distance of the two runs" if len(labels) == 2 else FILTER_SHARE
    axis.set_ylabel(f"random direction ({share})")
