"""Whether a heat map tells the truth: how fast a class is lost, or found, when pixels go in the order of the map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Predict = Callable[[Tensor], Tensor]
BLUR_FRAC = 8  # the blurred image is averaged over an eighth of its side


@dataclass(frozen=True)
class Faithfulness:
    """Areas under two curves, in [0, 1].

    Attributes:
        deletion: mean probability of the class while the hottest pixels are taken away; low is faithful.
        insertion: while they are put into a blurred image; high is faithful.
    """

    deletion: float
    insertion: float


@torch.no_grad()
def faithfulness(predict: Predict, image: Tensor, heat: Tensor, label: int, *, n_steps: int = 16) -> Faithfulness:
    """Return deletion and insertion scores of one heat map.

    Taken away means replaced by 0, the mean colour of a normalised image. The curves have `n_steps` + 1 points, from
    none to all of the pixels, in the order of the map, ties in the order of the pixels; the area is by the trapezoid
    rule.

    Source: Petsiuk et al., RISE, BMVC 2018, section 3.3.

    Args:
        predict: prepared images (n, C, H, W) → logits.
        image: prepared, (C, H, W).
        heat: the map, (H, W); only its order counts.
        label: the class of the map.
        n_steps: in how many portions the pixels go.

    Example:
        >>> image = torch.zeros(1, 4, 4)
        >>> image[0, 0, 0] = 1.0
        >>> sees = lambda images: torch.stack([images[:, 0, 0, 0] * 20 - 10, images[:, 0, 0, 0] * 0], 1)
        >>> found = faithfulness(sees, image, image[0], 0)  # the map points at the one pixel that counts
        >>> round(found.deletion, 2), round(found.insertion, 2)
        (0.03, 0.98)
    """
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    cuts = torch.linspace(0, len(order), n_steps + 1, device=order.device).round()
    taken = (rank[None] < cuts[:, None]).reshape(-1, 1, *heat.shape)
    deleted = torch.where(taken, torch.zeros_like(image), image)
    inserted = torch.where(taken, image, blurred(image))
    return Faithfulness(_area(predict, deleted, label), _area(predict, inserted, label))


def _area(predict: Predict, images: Tensor, label: int) -> float:
    curve = predict(images).double().softmax(1)[:, label]
    return ((curve[1:] + curve[:-1]) / 2).mean().item()


def blurred(image: Tensor) -> Tensor:
    """Return an image (C, H, W) averaged over squares of an eighth of its side: colours without shapes.

    Example:
        >>> blurred(torch.ones(3, 8, 8)).shape
        torch.Size([3, 8, 8])
    """
    half = max(1, image.shape[-1] // BLUR_FRAC // 2)
    padded = functional.pad(image[None], (half,) * 4, mode="replicate")
    return functional.avg_pool2d(padded, 2 * half + 1, stride=1)[0]
