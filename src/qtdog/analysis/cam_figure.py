"""Heat maps over images, a row per image and a column per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from qtdog.analysis.cam import Maps
from qtdog.analysis.figures import plain, save

INCHES = 1.7


def draw_cam(pixels: Tensor, names: Sequence[str], maps: Mapping[str, Maps], folder: Path) -> list[str]:
    """Draw the images, and the maps of each run over them; return the names of the files.

    Args:
        pixels: uint8 (n, H, W, C).
        names: the true class of each image.
        maps: of each run by its label, (n, H, W) in [0, 1].
        folder: where to.
    """
    n_rows, n_columns = len(names), 1 + len(maps)
    size = (INCHES * n_columns, INCHES * n_rows + 0.4)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for row, (image, name) in enumerate(zip(pixels.numpy(), names, strict=True)):
        show_image(axes[row][0], image)
        axes[row][0].set_ylabel(plain(name), fontsize=8)
        for axis, (label, found) in zip(axes[row][1:], maps.items(), strict=True):
            show_image(axis, image)
            axis.imshow(found[row], cmap="inferno", alpha=0.55, vmin=0, vmax=1)
            if row == 0:
                axis.set_title(plain(label), fontsize=8, wrap=True)
    axes[0][0].set_title("image", fontsize=8)
    return save(figure, folder, "cam")


def show_image(axis: Axes, image: np.ndarray) -> None:
    """Show a uint8 image (H, W, C), grey or in colour, without ticks."""
    axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
