"""AugMix's consistency: the same answer for an image and for two augmented views of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.objectives.base import DomainBatch, DomainOutputs, ModelView, Objective, WrappedObjective

N_VIEWS = 2
"""Augmented views beside the clean image, as published."""


def jensen_shannon(logits: Sequence[Tensor]) -> Tensor:
    """Return the Jensen-Shannon divergence of several predictions, the mean over images.

    Formula: 1/V Σ_v KL(p_v ‖ m), m = 1/V Σ_v p_v (Hendrycks et al., AugMix, ICLR 2020, Eq. 2).

    Args:
        logits: V tensors of shape (n, n_classes).

    Example:
        >>> jensen_shannon([torch.tensor([[0.0, 1.0]])] * 3)
        tensor(0.)
    """
    log_p = torch.stack([functional.log_softmax(one.float(), dim=1) for one in logits])
    log_mean = log_p.exp().mean(dim=0).clamp(1e-7, 1).log()  # cut as in the authors' code
    return (log_p.exp() * (log_p - log_mean)).sum(dim=2).mean()


class Consistency(WrappedObjective):
    """objective(clean images) + λ · JS(clean, two views), all from one pass over three times the images.

    Args:
        objective: the loss of the labels; a pure one, which looks only at features, logits and labels.
        weight: λ; 12 in the paper.

    Raises:
        ConfigError: the objective runs the model itself.
    """

    def __init__(self, objective: Objective, weight: float) -> None:
        super().__init__(objective, "and knows nothing of views")
        self.weight = weight

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the loss of the clean images and the divergence of their views (ValueError without views)."""
        if len(batch.views) != N_VIEWS:
            raise ValueError(f"a batch with {N_VIEWS} views of each image is needed, not {len(batch.views)}")
        features, logits = view(torch.cat([batch.images, *batch.views]))
        n = len(batch.images)
        whole = (features[:n], logits[:n], batch.labels)
        parts = zip(*(tensor.split(batch.sizes) for tensor in whole), strict=True)
        own = [DomainOutputs(*part) for part in parts]
        return self.loss(view.joined(own)) + self.weight * jensen_shannon(logits.split(n))
