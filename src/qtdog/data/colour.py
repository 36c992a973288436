"""Colour jitter on planes: a group of images at once, in place, with one factor per image.

All functions take `planes`, float32 (C, n, H, W) in [0, WHITE]: n contiguous planes per colour, one per image; and
`spare`, float32 (N_SPARE, n, H, W), whose content is overwritten (temporaries allocated afresh cost a fifth more time).
Formulas are those of torchvision's `v2.functional` for float images, which clamp to the full range after each
operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHITE = 255.0
"""The largest value. All operations are homogeneous, so the division by 255 can wait until the normalisation."""

RED, GREEN, BLUE = 0.2989, 0.587, 0.114
CENTRES = (0.0, 2.0, -2.0)
"""Where red, green and blue lie on the hue circle, whose circumference is 6."""

TINY = 1e-30
N_SPARE = 7


def grey(planes: Tensor, out: Tensor) -> Tensor:
    """Return the luma 0.2989 R + 0.587 G + 0.114 B (ITU-R 601-2) of three planes, (n, H, W), written to `out`."""
    return torch.mul(planes[0], RED, out=out).add_(planes[1], alpha=GREEN).add_(planes[2], alpha=BLUE)


def brightness_(planes: Tensor, factor: Tensor, spare: Tensor) -> None:
    """Multiply by `factor` (n, 1, 1)."""
    del spare
    planes.mul_(factor).clamp_(max=WHITE)


def contrast_(planes: Tensor, factor: Tensor, spare: Tensor) -> None:
    """Blend with the image's mean luma: f · x + (1 - f) · mean(grey(x)), `factor` f (n, 1, 1).

    The mean of the luma is the luma of the planes' means. These are taken in two stages: torch splits a long sum with
    a single result among its threads, and the last bit would depend on their number.
    """
    del spare
    means = planes.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
    mean = means[0] if len(planes) == 1 else grey(means, torch.empty_like(means[0]))
    planes.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, WHITE)


def saturation_(planes: Tensor, factor: Tensor, spare: Tensor) -> None:
    """Blend with the pixel's luma: f · x + (1 - f) · grey(x), `factor` f (n, 1, 1); nothing to do for one plane."""
    if len(planes) == 3:
        torch.lerp(grey(planes, spare[0]), planes, factor, out=planes).clamp_(0, WHITE)


def hue_(planes: Tensor, turn: Tensor, spare: Tensor) -> None:
    """Turn the hue by `turn` (n, 1, 1), a share of the circle, as going to HSV and back would; not for one plane.

    With V = max, m = min, chroma C = V - m, and the hue circle of circumference 6 laid out as (-3, 3] around red:
    |H| = (G + B - R + V - 2m) / C, with the sign of G - B. A colour whose centre lies at c on the circle then becomes
    m + C · clamp(2 - d, 0, 1), where d is the distance on the circle from H + 6 · turn to c. With x = H + 6 · turn - c
    and |x| <= 6 that distance is 3 - ||x| - 3|: no branches and no sextants.
    """
    if len(planes) != 3:
        return
    red, green, blue = planes
    chroma, base, hue, scratch = spare[:4]
    torch.maximum(torch.maximum(red, green, out=chroma), blue, out=chroma)
    torch.minimum(torch.minimum(red, green, out=base), blue, out=base)
    torch.add(green, blue, out=hue).sub_(red).add_(chroma).sub_(base, alpha=2)
    chroma.sub_(base)
    hue.div_(torch.add(chroma, TINY, out=scratch)).copysign_(torch.sub(green, blue, out=scratch))
    base.sub_(chroma)
    shift = torch.remainder(6 * turn - torch.tensor(CENTRES)[:, None, None, None] + 3, 6) - 3  # so that |x| <= 6
    weight = torch.add(hue, shift, out=spare[4:7]).abs_().sub_(3).abs_().clamp_(1, 2)  # 1 + clamp(2 - d, 0, 1)
    torch.addcmul(base, chroma, weight, out=planes)


JITTER = (brightness_, contrast_, saturation_, hue_)
"""The four operations, in the order of `AugmentParameters.factors`."""
