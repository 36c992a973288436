"""DomainBed's training augmentation on a whole uint8 batch, with its own random draw for every image.

Same operations and formulas as torchvision's v2 transforms applied to one image after another. Images whose jitter
comes in the same order are processed together, a few at a time so that they stay in the processor's cache; what happens
to an image does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from qtdog.data.augment_parameters import AugmentParameters
from qtdog.data.colour import JITTER, grey

CHUNK_PIXELS = 20_000


def augment(
    images: Tensor, parameters: AugmentParameters, *, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
) -> Tensor:
    """Return augmented images, (x - mean) / std, float32 (n, C, H, W) in channels-last memory.

    Args:
        images: uint8 (n, H, W, C) with C = 3 or 1; not changed.
        parameters: one row per image (`draw_parameters`).
        mean: per channel, or one for all; with the default mean and std the result is in [0, 1].
        std: likewise.
    """
    n, height, width, channels = images.shape
    result = torch.empty((n, height, width, channels))
    shift = torch.tensor(mean).expand(channels)
    scale = torch.tensor(std).expand(channels)
    for rows in _groups(parameters.order, max(1, CHUNK_PIXELS // (height * width))):
        group = parameters.take(rows)
        planes = _crop(images, rows, group)
        _jitter_(planes, group)
        for c in range(channels):
            result[rows, :, :, c] = planes[c].sub_(shift[c]).div_(scale[c]).unflatten(1, (height, width))
    return result.permute(0, 3, 1, 2)


def _groups(order: Tensor, most: int) -> list[Tensor]:
    """Rows that share an order of the jitter, at most `most` at a time."""
    code = order @ torch.tensor([64, 16, 4, 1])
    return [part for value in code.unique() for part in torch.nonzero(code == value)[:, 0].split(most)]


def _crop(images: Tensor, rows: Tensor, group: AugmentParameters) -> Tensor:
    """Crop, resize back and flip on uint8; then planes, float32 (C, n, P) in [0, 1]."""
    size = list(images.shape[1:3])
    done = []
    for row, (top, left, height, width), flip in zip(
        rows.tolist(), group.crop.tolist(), group.flip.tolist(), strict=True
    ):
        image = functional.resized_crop(images[row].permute(2, 0, 1), top, left, height, width, size)
        done.append(image.flip(2) if flip else image)
    return torch.stack(done, dim=1).flatten(2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _jitter_(planes: Tensor, group: AugmentParameters) -> None:
    for operation in group.order[0].tolist():
        JITTER[operation](planes, group.factors[:, operation, None])
    if group.grey.any():
        planes[:, group.grey] = grey(planes[:, group.grey])
