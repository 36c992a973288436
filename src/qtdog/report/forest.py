"""Methods against a reference, as a picture: the mean paired difference of each with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from qtdog.report.compare import Comparison


def plot_differences(panels: Mapping[str, Mapping[str, Comparison]], reference: str, path: Path) -> None:
    """Draw a panel for each measure and a line for each method: mean difference (points), 95 % interval, single pairs.

    Args:
        panels: title → method → its comparison with the reference; methods stand in the order of the first panel, top
            down. A method without an interval (one pair) is drawn hollow.
        reference: the method at zero.
        path: image file to write; its folder is made. The ending decides the format.

    Raises:
        OSError: the file cannot be written.
        ValueError: no panel, or an unknown format of image.
    """
    methods = list(dict.fromkeys(method for rows in panels.values() for method in rows))
    size = (4.6 * len(panels) + 1, 0.34 * len(methods) + 1.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, methods, rows)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"points − {reference}")
    labels = [f"{method}  ({max(rows[method].n for rows in panels.values() if method in rows)})" for method in methods]
    axes[0][0].set_yticks(range(len(methods)), labels)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axis: Axes, methods: list[str], rows: Mapping[str, Comparison]) -> None:
    axis.axvline(0, color="grey", linewidth=1)
    axis.grid(axis="x", alpha=0.3)
    for place, method in enumerate(methods):
        found = rows.get(method)
        if found is None:
            continue
        axis.scatter([100 * one for one in found.differences], [place] * found.n, s=8, color="tab:grey", alpha=0.4)
        known = found.low is not None and found.high is not None
        if known:
            axis.plot([100 * (found.low or 0.0), 100 * (found.high or 0.0)], [place, place], color="tab:blue")
        axis.plot(100 * found.mean, place, "o", color="tab:blue", fillstyle="full" if known else "none", markersize=6)
