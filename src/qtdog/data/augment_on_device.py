"""DomainBed's augmentation of whole uint8 batches on a GPU: no loop over images, and nothing that waits for the device.

The draws are those of the CPU (`draw_parameters`), and so are the operations; only the resizing is written anew, as two
products with one matrix of weights per image, so that each image has a crop of its own in one call. Values differ from
those of the CPU by the rounding of resized pixels, at most one of 255 levels in each direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtdog.data.augment import (
    JITTER_FUNCTIONS,
    N_SPARE,
    WHITE,
    AugmentParameters,
    grey,
    hue_shifts,
    upload,
)


def resize_weights(start: Tensor, length: Tensor, extent: int, size: int) -> Tensor:
    """Return the weights of an antialiased bilinear resize of crops, float32 (n, size, extent); rows add up to 1.

    Output pixel i of a crop of length L lies at c = (i + 1/2) · L / size and takes input pixel x with
    max(0, 1 - |x + 1/2 - c| / max(L / size, 1)), normalized: Pillow's and torch's `antialias=True`.

    Args:
        start: first pixel of each crop, float32 (n,).
        length: pixels of each crop, float32 (n,).
        extent: pixels of the whole image in that direction.
        size: pixels of the result.

    Example:
        >>> resize_weights(torch.tensor([1.0]), torch.tensor([2.0]), 4, 2)[0]
        tensor([[0., 1., 0., 0.],
                [0., 0., 1., 0.]])
    """
    scale = (length / size)[:, None, None]
    position = torch.arange(extent, device=start.device, dtype=torch.float32) - start[:, None]  # within the crop
    center = (torch.arange(size, device=start.device, dtype=torch.float32) + 0.5)[:, None] * scale
    weights = (1 - (position[:, None] + 0.5 - center).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights *= ((position >= 0) & (position < length[:, None]))[:, None]
    return weights / weights.sum(2, keepdim=True)


def crop_flip(images: Tensor, parameters: AugmentParameters, size: int) -> Tensor:
    """Return crops, resized (bilinear, antialiased, whole grey levels) and flipped, float32 (n, size, size, C).

    Args:
        images: uint8 (n, H, W, C), on any device.
        parameters: one row per image, on the CPU; only `crop` and `flip` count.
        size: height = width of the result, in pixels.
    """
    drawn = torch.cat([parameters.crop.float(), parameters.flip[:, None].float()], dim=1)
    top, left, rows, columns, flip = upload(drawn, images.device).unbind(1)
    n, height, width, channels = images.shape
    across = resize_weights(left, columns, width, size)
    across = torch.where(flip[:, None, None] > 0, across.flip(1), across)
    # Columns first, rounded in between, as uint8 images are resized on the CPU.
    by_column = images.permute(0, 2, 1, 3).reshape(n, width, height * channels).float()
    narrow = torch.bmm(across, by_column).round_().clamp_(0, WHITE).view(n, size, height, channels)
    by_row = narrow.permute(0, 2, 1, 3).reshape(n, height, size * channels)
    down = resize_weights(top, rows, height, size)
    return torch.bmm(down, by_row).round_().clamp_(0, WHITE).view(n, size, size, channels)


def augment_on_device(
    images: Tensor,
    parameters: AugmentParameters,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crops_made: bool = False,
) -> Tensor:
    """Return augmented images on the device of `images`, float32 (n, C, size, size) in channels-last memory.

    Args:
        images: uint8 (n, H, W, C) with C = 3 or 1.
        parameters: one row per image, on the CPU (`draw_parameters`).
        size: height = width of the result, in pixels.
        mean: per channel, or one for all.
        std: likewise.
        crops_made: the images are cropped, resized and flipped already, and have the size of the result.

    Example:
        >>> from qtdog.data.augment import draw_parameters
        >>> images = torch.zeros((2, 32, 32, 3), dtype=torch.uint8)
        >>> drawn = draw_parameters(torch.Generator(), 2, 32)
        >>> augment_on_device(images, drawn, size=32, mean=(0.5,), std=(0.5,)).shape
        torch.Size([2, 3, 32, 32])
    """
    device, channels = images.device, images.shape[3]
    crops = images.float() if crops_made else crop_flip(images, parameters, size)
    planes = _jitter(crops.permute(3, 0, 1, 2), parameters)
    if channels == 3:
        is_grey = upload(parameters.grey, device)[:, None, None]
        planes = torch.where(is_grey, grey(planes, torch.empty_like(planes[0])), planes)
    for c, plane in enumerate(planes):
        one_mean, one_std = mean[c if len(mean) > 1 else 0], std[c if len(std) > 1 else 0]
        plane.mul_(1 / (WHITE * one_std)).sub_(one_mean / one_std)
    return planes.permute(1, 0, 2, 3).contiguous(memory_format=torch.channels_last)


def _jitter(planes: Tensor, parameters: AugmentParameters) -> Tensor:
    """Return planes (C, n, H, W) after the four operations, each image's in its order.

    Images are sorted by what is next for them, so that each operation works on one slice of the batch. Which rows those
    are is known on the CPU, where the draws are; the device gets them as indices.
    """
    device, n = planes.device, len(parameters)
    sorted_by = [parameters.order[:, turn].argsort(stable=True) for turn in range(4)]
    places = [torch.empty_like(rows).scatter_(0, rows, torch.arange(n)) for rows in sorted_by]
    # Where the rows of each turn lie in the turn before; the last brings them back into the order of the batch.
    moves = [sorted_by[0], *(before[rows] for before, rows in zip(places[:-1], sorted_by[1:], strict=True)), places[-1]]
    factors = parameters.factors.T
    changes = torch.cat([factors[:3], hue_shifts(factors[3][:, None, None])[..., 0, 0]])  # 3 factors, 3 shifts of hue
    on_device = upload(torch.stack(moves), device).unbind()
    values = upload(torch.stack([changes[:, rows] for rows in sorted_by]), device)[..., None, None]
    spare = planes.new_empty((N_SPARE, *planes.shape[1:]))
    for turn, move in enumerate(on_device[:4]):
        planes = planes[:, move]
        counts = parameters.order[:, turn].bincount(minlength=4).tolist()
        first = 0
        for operation, count in enumerate(counts):
            part = slice(first, first + count)
            first += count
            if count:
                change = values[turn, operation, part] if operation < 3 else values[turn, 3:, part]
                JITTER_FUNCTIONS[operation](planes[:, part], change, spare[:, part])
    return planes[:, on_device[4]]
