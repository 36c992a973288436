"""Mixup of images from different domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective
from qtdog.objectives.functional import random_ring


def mixed_loss(logits: Tensor, labels: tuple[Tensor, Tensor], share: float) -> Tensor:
    """Return λ · CE(z, y₁) + (1 − λ) · CE(z, y₂).

    Source: Zhang et al., ICLR 2018, section 2; the same as the cross-entropy with the mixed label λ y₁ + (1 − λ) y₂.

    Args:
        logits: z of the mixed images, shape (n, n_classes).
        labels: y₁ and y₂, int64, shape (n,) each.
        share: λ, of the first image.

    Returns:
        A scalar.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0]])  # cross-entropies 0.3133 and 1.3133
        >>> mixed_loss(logits, (torch.tensor([0]), torch.tensor([1])), 0.75)
        tensor(0.5633)
    """
    return share * cross_entropy(logits, labels[0]) + (1 - share) * cross_entropy(logits, labels[1])


def draw_shares(alpha: float, n: int) -> list[float]:
    """Return n draws from Beta(α, α), from torch's global state, which the training loop seeds for every step.

    Example:
        >>> all(0 <= share <= 1 for share in draw_shares(0.2, 3))
        True
    """
    concentration = torch.tensor(alpha, dtype=torch.float64)
    return torch.distributions.Beta(concentration, concentration).sample((n,)).tolist()


@OBJECTIVES.register("mixup")
class Mixup(Objective):
    """Mixtures of images and labels of two domains (Zhang et al., ICLR 2018; between domains Yan et al., 2020).

    The domains stand on a ring in random order. Each gives its images x₁ with labels y₁, its neighbor x₂ and y₂; one
    λ ~ Beta(α, α) per pair of domains mixes x = λ x₁ + (1 − λ) x₂. L = mean over the pairs of `mixed_loss`. As in
    DomainBed. All mixtures go through the network in one pass; with batch norm that is not frozen, its statistics are
    those of all of them.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "alpha": HyperParameter(0.2, "of Beta(α, α)", low=1e-3, search=(1e-1, 10), log=True),
    }
    MIN_DOMAINS = 2
    EQUAL_SHARES = True

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        images, labels = zip(*batch.split(), strict=True)
        pairs = random_ring(len(images))
        shares = draw_shares(self.number("alpha"), len(pairs))
        mixed = torch.empty_like(batch.images)  # of its memory format too: `cat` loses that of grey images
        for (one, other), share, part in zip(pairs, shares, mixed.split(batch.sizes), strict=True):
            torch.lerp(images[other], images[one], share, out=part)
        _, logits = view(mixed)
        chosen = [(labels[one], labels[other]) for one, other in pairs]
        return _mean_loss(logits.split(batch.sizes), chosen, shares)


def _mean_loss(logits: Sequence[Tensor], labels: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]) -> Tensor:
    return torch.stack([mixed_loss(*mixture) for mixture in zip(logits, labels, shares, strict=True)]).mean()
