"""How every figure of an analysis looks and where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito, 2008: distinguishable for readers who see few colors, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
MAX_PANELS_WIDE = 4


def curve_style(n: int) -> dict[str, Any]:
    """Return colour and marker of curve number `n`: after eight they begin anew, with another pairing.

    Example:
        >>> curve_style(0), curve_style(0) == curve_style(8)
        ({'color': '#0072B2', 'marker': 'o'}, False)
    """
    shift = n // len(COLORS)
    return {"color": COLORS[n % len(COLORS)], "marker": MARKERS[(n + shift) % len(MARKERS)]}


def panels(n: int, *, width: float = 4.4, height: float = 3.6, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure with `n` panels, at most four in a row."""
    columns = min(n, MAX_PANELS_WIDE)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharey=share_y, layout="constrained"
    )
    flat = [axis for row in axes for axis in row]
    for axis in flat[n:]:
        axis.remove()
    return figure, flat[:n]


def escape_dollar(text: str) -> str:
    r"""Return a name as it is: a dollar sign in it begins no formula.

    Example:
        >>> print(escape_dollar("a$b"))
        a\$b
    """
    return text.replace("$", r"\$")


def legend(figure: Figure, axis: Axes) -> None:
    """Put the legend of one panel below the figure."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False, fontsize=8)


def save_figure(figure: Figure, folder: Path, name: str) -> list[str]:
    """Write a figure as PNG and PDF, close it, and return the names of the files.

    The files hold no date, so that the same numbers give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}.png", f"{name}.pdf"]
    figure.savefig(folder / names[0], dpi=110)
    figure.savefig(folder / names[1], metadata={"CreationDate": None})
    plt.close(figure)
    return names


def mark_start(axis: Axes, steps: Sequence[int | None]) -> None:
    """Mark the steps at which quantization begins, each once."""
    for n, step in enumerate(sorted({step for step in steps if step is not None})):
        axis.axvline(step, color="#666666", linestyle=":", label="quantization starts" if n == 0 else None)
