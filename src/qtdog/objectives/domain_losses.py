"""The classification loss of each domain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.objectives.view import DomainOutputs


def domain_losses(domains: Sequence[DomainOutputs]) -> Tensor:
    """Return the mean cross-entropy of each domain, shape (n_domains,).

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> domain_losses([DomainOutputs(logits, logits, torch.tensor([0, 3]))] * 2)  # log 4
        tensor([1.3863, 1.3863])
    """
    return torch.stack([functional.cross_entropy(domain.logits, domain.labels) for domain in domains])
