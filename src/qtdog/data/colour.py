"""Colour jitter on planes: whole groups of images at once, in place, with one factor per image.

All functions take `planes`, float32 (C, n, P) in [0, 1]: one contiguous plane per colour, n images of P pixels. Formulas
are those of torchvision's `v2.functional` for float images, which clamp to [0, 1] after each operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

RED, GREEN, BLUE = 0.2989, 0.587, 0.114
TINY = 1e-30
CENTRES = (0.0, 2.0, -2.0)
"""Where red, green and blue lie on the hue circle, whose circumference is 6."""


def grey(planes: Tensor) -> Tensor:
    """Return the luma 0.2989 R + 0.587 G + 0.114 B (ITU-R 601-2), (n, P); of one plane, itself."""
    if len(planes) == 1:
        return planes[0]
    return torch.mul(planes[0], RED).add_(planes[1], alpha=GREEN).add_(planes[2], alpha=BLUE)


def brightness_(planes: Tensor, factor: Tensor) -> None:
    """Multiply by `factor` (n, 1)."""
    planes.mul_(factor).clamp_(max=1)


def contrast_(planes: Tensor, factor: Tensor) -> None:
    """Blend with the image's mean luma: f · x + (1 - f) · mean(grey(x)), `factor` f (n, 1)."""
    offset = grey(planes).mean(dim=1, keepdim=True).mul_(1 - factor)
    planes.mul_(factor).add_(offset).clamp_(0, 1)


def saturation_(planes: Tensor, factor: Tensor) -> None:
    """Blend with the pixel's luma: f · x + (1 - f) · grey(x), `factor` f (n, 1)."""
    if len(planes) == 3:
        torch.lerp(grey(planes), planes, factor, out=planes).clamp_(0, 1)


def hue_(planes: Tensor, turn: Tensor) -> None:
    """Turn the hue by `turn` (n, 1), a share of the circle, as going to HSV and back would.

    With V = max, m = min, chroma C = V - m, and the hue circle of circumference 6 laid out as (-3, 3] around red:
    |H| = (G + B - R + V - 2m) / C, with the sign of G - B. A colour whose centre lies at c on the circle is then
    m + C · clamp(2 - d, 0, 1), d = distance on the circle from H + 6 · turn to c; and 2 - d = ||x| - 3| - 1 for
    |x| <= 6. No branches, no look-up of the sextant.
    """
    if len(planes) != 3:
        return
    red, green, blue = planes
    top = torch.maximum(torch.maximum(red, green), blue)
    base = torch.minimum(torch.minimum(red, green), blue)
    hue = torch.add(green, blue).sub_(red).add_(top).sub_(base, alpha=2)
    chroma = top.sub_(base)
    hue.div_(chroma + TINY).copysign_(green - blue)
    base.sub_(chroma)
    shift = 6 * turn - torch.tensor(CENTRES).reshape(3, 1, 1)
    shift = torch.remainder(shift + 3, 6) - 3
    weight = torch.add(hue, shift).abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(base, chroma, weight, out=planes)


JITTER = (brightness_, contrast_, saturation_, hue_)
