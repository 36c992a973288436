"""Correlation alignment, as its first paper has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainOutputs, Objective
from qtdog.objectives.coral import covariance
from qtdog.objectives.functional import domain_losses, mean_over_pairs


def deep_coral_penalty(features: Sequence[Tensor]) -> Tensor:
    """Return how far the covariances of features differ between domains.

    Formula: mean over pairs of domains i < j of ‖C_i − C_j‖²_F / (4 d²), with the covariance C over n − 1. Source: Sun
    and Saenko, ECCV workshops 2016, Eq. 1 to 3, for one pair; the mean over pairs is ours.

    Args:
        features: of each domain, shape (n, d), n ≥ 2.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [2.0]])  # variance 2
        >>> deep_coral_penalty([x, 2 * x])  # (2 - 8)² / 4
        tensor(9.)
    """
    return mean_over_pairs(_distance, [covariance(domain) for domain in features])


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().mean() / 4


@OBJECTIVES.register("deep-coral")
class DeepCORAL(Objective):
    """Alignment of the features' covariances alone: Deep CORAL (Sun and Saenko, ECCV workshops 2016).

    L = mean over domains of CE + weight · `deep_coral_penalty` of the penultimate features. DomainBed's form is
    `coral`: it counts the means too, and covariances four times as much.
    """

    MEAN_CROSS_ENTROPY: ClassVar[str] = "domains"
    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1.0, "of the penalty (λ; searched as coral's)", low=0, search=(1e-1, 10), log=True),
    }
    MIN_DOMAINS = 2
    MIN_BATCH = 2

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss of the outputs of all source domains."""
        penalty = deep_coral_penalty([domain.features for domain in domains])
        return domain_losses(domains).mean() + self.number("weight") * penalty
