"""Empirical risk minimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.objectives.base import OBJECTIVES, DomainOutputs, Objective


def erm_loss(domains: Sequence[DomainOutputs]) -> Tensor:
    """Return the mean cross-entropy over the images of all domains.

    Formula: L = 1/n · Σ_i −log softmax(z_i)[y_i]. Source: Vapnik, *Statistical Learning Theory*, 1998; as in DomainBed
    (Gulrajani and Lopez-Paz, ICLR 2021), where every image of the joined batch weighs the same.

    Args:
        domains: outputs of each source domain; features are not read.

    Returns:
        A scalar.

    Example:
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> round(erm_loss([DomainOutputs(logits, logits, labels)]).item(), 4)  # log 4
        1.3863
    """
    logits = torch.cat([domain.logits for domain in domains])
    labels = torch.cat([domain.labels for domain in domains])
    return functional.cross_entropy(logits, labels)


@OBJECTIVES.register("erm")
class ERM(Objective):
    """Mean cross-entropy over all images (Vapnik, 1998)."""

    MEAN_CROSS_ENTROPY: ClassVar[str] = "images"

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return `erm_loss`."""
        return erm_loss(domains)
