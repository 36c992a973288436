"""What is drawn at random for each image of a batch, before any pixel is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = (0.7, 1.0)
RATIO = (3 / 4, 4 / 3)
JITTER = 0.3
GREY_FRAC = 0.1
TRIES = 10


@dataclass(frozen=True)
class AugmentParameters:
    """One row per image.

    Attributes:
        crop: int64 (n, 4), top, left, height, width in pixels.
        flip: bool (n,).
        factors: float32 (n, 4): factors of brightness, contrast and saturation; turn of the hue (share of a circle).
        order: int64 (n, 4), the order in which the four are applied.
        grey: bool (n,), whether the image loses its colours at the end.
    """

    crop: Tensor
    flip: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.flip)

    def take(self, rows: Tensor) -> AugmentParameters:
        """Return the parameters of some images (`rows` int64)."""
        return AugmentParameters(
            self.crop[rows], self.flip[rows], self.factors[rows], self.order[rows], self.grey[rows]
        )


def draw_parameters(generator: torch.Generator, n: int, size: int) -> AugmentParameters:
    """Return DomainBed's random augmentation for n images of `size` x `size` pixels.

    Random resized crop (area 0.7 to 1, aspect 3/4 to 4/3), flip with probability 1/2, jitter of brightness, contrast
    and saturation by factors U(0.7, 1.3) and of the hue by U(-0.3, 0.3), in random order, and grey with probability
    0.1.

    Example:
        >>> draw_parameters(torch.Generator().manual_seed(0), 5, 32).crop.shape
        torch.Size([5, 4])
    """
    crop = _draw_crops(generator, n, size)
    flip = torch.rand(n, generator=generator) < 0.5
    factors = 1 + JITTER * (2 * torch.rand((n, 4), generator=generator) - 1)
    factors[:, 3] -= 1
    order = torch.rand((n, 4), generator=generator).argsort(dim=1)
    grey = torch.rand(n, generator=generator) < GREY_FRAC
    return AugmentParameters(crop, flip, factors, order, grey)


def _draw_crops(generator: torch.Generator, n: int, size: int) -> Tensor:
    """The first of ten tries that fits into the image, as torchvision draws it; the whole image if none does."""
    uniform = torch.rand((4, n, TRIES), generator=generator, dtype=torch.float64)
    area = size * size * (SCALE[0] + (SCALE[1] - SCALE[0]) * uniform[0])
    log_low, log_high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(log_low + (log_high - log_low) * uniform[1])
    width, height = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (width <= size) & (height <= size)
    top, left = (uniform[2] * (size - height + 1)).floor(), (uniform[3] * (size - width + 1)).floor()
    tries = torch.stack([top, left, height, width], dim=2)
    first = tries[torch.arange(n), fits.int().argmax(dim=1)]
    whole = torch.tensor([0, 0, size, size], dtype=torch.float64)
    return torch.where(fits.any(dim=1, keepdim=True), first, whole).to(torch.int64)
