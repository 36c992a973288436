"""DomainBed's training augmentation on a whole uint8 batch, with its own random draw for every image.

Same operations and formulas as torchvision's v2 transforms applied to one image after another. Images whose jitter
comes in the same order are processed together, a few at a time so that they stay in the processor's cache; what happens
to an image does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from qtdog.data.augment_parameters import AugmentParameters
from qtdog.data.buffers import BufferPool
from qtdog.data.colour import JITTER, N_SPARE, WHITE, grey

CHUNK_PIXELS = 1 << 18


def augment(
    images: Tensor,
    parameters: AugmentParameters,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    pool: BufferPool | None = None,
) -> Tensor:
    """Return augmented images, (x - mean) / std, float32 (n, C, H, W) in channels-last memory.

    Args:
        images: uint8 (n, H, W, C) with C = 3 or 1; not changed.
        parameters: one row per image (`draw_parameters`).
        mean: per channel, or one for all; with the default mean and std the result is in [0, 1].
        std: likewise.
        pool: where the memory comes from; default: fresh memory.

    Example:
        >>> from qtdog.data.augment_parameters import draw_parameters
        >>> images = torch.zeros((2, 32, 32, 3), dtype=torch.uint8)
        >>> augment(images, draw_parameters(torch.Generator(), 2, 32)).shape
        torch.Size([2, 3, 32, 32])
    """
    pool = pool or BufferPool()
    n, height, width, channels = images.shape
    n_together = max(1, CHUNK_PIXELS // (height * width))
    workspace = pool.take(((channels + N_SPARE) * n_together * height * width,), torch.float32)
    result = pool.take((n, height, width, channels), torch.float32)
    for rows in _groups(parameters.order, n_together):
        shape = (channels + N_SPARE, len(rows), height, width)
        planes, spare = workspace[: math.prod(shape)].view(shape).split((channels, N_SPARE))
        group = parameters.take(rows)
        _crop(images, rows, group, planes)
        _jitter_(planes, group, spare)
        _write_normalised(planes, result, rows, mean, std)
    return result.permute(0, 3, 1, 2)


def _groups(order: Tensor, most: int) -> list[Tensor]:
    """Rows that share an order of the jitter, at most `most` at a time."""
    code = order @ torch.tensor([64, 16, 4, 1])
    return [part for value in code.unique() for part in torch.nonzero(code == value)[:, 0].split(most)]


def _crop(images: Tensor, rows: Tensor, group: AugmentParameters, planes: Tensor) -> None:
    """Crop, resize back (in uint8, as the original does on PIL images) and flip; write planes in [0, WHITE]."""
    size = images.shape[1:3]
    by_image = planes.numpy()
    draws = zip(rows.tolist(), group.crop.tolist(), group.flip.tolist(), strict=True)
    for place, (row, (top, left, height, width), flip) in enumerate(draws):
        crop = images[row : row + 1, top : top + height, left : left + width].permute(0, 3, 1, 2)
        resized = interpolate(crop, size=size, mode="bilinear", antialias=True)[0].numpy()
        # NumPy converts, separates the colours and flips (a negative stride) in one pass; torch would need two.
        np.copyto(by_image[:, place], resized[:, :, ::-1] if flip else resized)


def _jitter_(planes: Tensor, group: AugmentParameters, spare: Tensor) -> None:
    for operation in group.order[0].tolist():
        JITTER[operation](planes, group.factors[:, operation, None, None], spare)
    if len(planes) == 3:
        for place in torch.nonzero(group.grey)[:, 0].tolist():
            planes[:, place] = grey(planes[:, place], spare[0, place])


def _write_normalised(
    planes: Tensor, result: Tensor, rows: Tensor, mean: Sequence[float], std: Sequence[float]
) -> None:
    channels = len(planes)
    shift = -torch.tensor(mean).div(torch.tensor(std)).expand(channels)
    scale = (1 / (WHITE * torch.tensor(std))).expand(channels).tolist()
    for place, row in enumerate(rows.tolist()):
        for c in range(channels):
            torch.add(shift[c], planes[c, place], alpha=scale[c], out=result[row, :, :, c])
