"""From uint8 pixels to what a network sees; training, evaluation and prediction share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x / 255 - mean) / std, float32 (n, C, H, W) in channels-last memory.

    Args:
        images: uint8 (n, H, W, C). The token numbers of texts, int64 (n, length), are returned as they are.
        mean: per channel, of images in [0, 1].
        std: likewise.

    Example:
        >>> normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), [0.5], [0.5]).flatten()
        tensor([1.])
    """
    if images.ndim == 2:
        return images
    n, height, width, channels = images.shape
    # One row of W · C constants makes the innermost loop long: ten times faster than broadcasting C of them.
    scale = torch.tensor(std, dtype=torch.float32).mul_(255).reciprocal_().expand(channels).repeat(width)
    offset = (torch.tensor(mean, dtype=torch.float32) / torch.tensor(std)).expand(channels).repeat(width)
    flat = images.reshape(n * height, width * channels).to(torch.float32)
    return flat.mul_(scale).sub_(offset).reshape(n, height, width, channels).permute(0, 3, 1, 2)
