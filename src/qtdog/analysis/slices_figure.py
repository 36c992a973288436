"""Confusion matrices and the surest mistakes as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from qtdog.analysis.cam_figure import show_image
from qtdog.analysis.figures import panels, plain, save
from qtdog.analysis.slices import Answer, Confusion
from qtdog.analysis.subject import Images, Subject

COLUMNS = 6
INCHES = 1.6
MAX_NUMBERED = 12  # classes, up to which the cells hold their numbers


def draw_confusions(tables: Mapping[str, Confusion], subject: Subject, folder: Path, name: str) -> list[str]:
    """Draw the confusion matrix of each domain, rows in percent of the true class; return the names of the files."""
    figure, axes = panels(len(tables), width=4.0, height=3.8)
    for axis, (domain, table) in zip(axes, tables.items(), strict=True):
        _matrix(axis, table, subject.dataset.classes)
        role = "target" if domain == subject.target else "source"
        axis.set_title(plain(f"{domain} ({role})"))
    axes[0].set_ylabel("true class")
    figure.suptitle(plain(subject.label), fontsize=10)
    return save(figure, folder, name)


def _matrix(axis: Axes, table: Confusion, classes: Sequence[str]) -> None:
    shares = 100 * table / np.maximum(table.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    if len(classes) <= MAX_NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            colour = "black" if share > 50 else "white"
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=colour)
        names = [plain(name) for name in classes]
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("called (% of the true class)")


def draw_mistakes(
    mistakes: Sequence[Answer], images: Mapping[str, Images], subject: Subject, folder: Path, name: str
) -> list[str]:
    """Draw the images of wrong answers with what was said of them; no file if there are none, or of texts."""
    if not mistakes or subject.model.info.preprocessing.max_tokens:
        return []
    columns = min(COLUMNS, len(mistakes))
    rows = -(-len(mistakes) // columns)
    size = (INCHES * columns, (INCHES + 0.4) * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    flat = [axis for row in axes for axis in row]
    for axis in flat[len(mistakes) :]:
        axis.remove()
    classes = subject.dataset.classes
    for axis, mistake in zip(flat, mistakes, strict=False):
        found = images[mistake.domain]
        show_image(axis, found.pixels[found.keys.index(mistake.key)].numpy())
        said = f"said {classes[mistake.predicted]} ({100 * mistake.confidence:.0f} %)\nis {classes[mistake.label]}"
        axis.set_title(plain(said), fontsize=7)
    figure.suptitle(plain(f"{subject.label}: surest mistakes"), fontsize=9)
    return save(figure, folder, name)
