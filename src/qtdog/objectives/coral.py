"""Correlation alignment: as DomainBed has it, and as its first paper has it (Deep CORAL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainOutputs, Objective
from qtdog.objectives.functional import domain_losses, mean_over_pairs


def coral_penalty(features: Sequence[Tensor]) -> Tensor:
    """Return how far means and covariances of features differ between domains.

    Formula: mean over pairs of domains i < j of [mean((μ_i − μ_j)²) + mean((C_i − C_j)²)], with the covariance C over
    n − 1. Source: DomainBed's CORAL, after Sun and Saenko (ECCV workshops 2016), whose own form is `deep-coral`.

    Args:
        features: of each domain, shape (n, d), n ≥ 2.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
        >>> coral_penalty([x, 2 * x])  # (1 - 2)² + (2 - 8)²
        tensor(37.)
    """
    moments = [(domain.mean(0), covariance(domain)) for domain in features]
    return mean_over_pairs(_distance, moments)


def covariance(features: Tensor) -> Tensor:
    """Return the covariance (d, d) of features (n, d), over n − 1.

    Example:
        >>> import torch
        >>> covariance(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        tensor([[ 2.0000, -1.0000],
                [-1.0000,  0.5000]])
    """
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    (mean, cov), (other_mean, other_cov) = one, other
    return (mean - other_mean).square().mean() + (cov - other_cov).square().mean()


@OBJECTIVES.register("coral")
class CORAL(Objective):
    """Alignment of the features' means and covariances: CORAL as in DomainBed (after Sun and Saenko, 2016).

    L = mean over domains of CE + weight · `coral_penalty` of the penultimate features.
    """

    MEAN_CROSS_ENTROPY: ClassVar[str] = "domains"
    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1.0, "of the penalty (mmd_gamma)", low=0, search=(1e-1, 10), log=True),
    }
    MIN_DOMAINS = 2
    MIN_BATCH = 2

    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        """Return how far the features (n, d) of the domains differ."""
        return coral_penalty(features)

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss of the outputs of all source domains."""
        penalty = self.penalty([domain.features for domain in domains])
        return domain_losses(domains).mean() + self.number("weight") * penalty


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
    return mean_over_pairs(_covariance_distance, [covariance(domain) for domain in features])


def _covariance_distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().mean() / 4


@OBJECTIVES.register("deep-coral")
class DeepCORAL(CORAL):
    """Alignment of the features' covariances alone: Deep CORAL (Sun and Saenko, ECCV workshops 2016).

    L = mean over domains of CE + weight · `deep_coral_penalty` of the penultimate features. DomainBed's form is
    `coral`: it counts the means too, and covariances four times as much.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1.0, "of the penalty (λ; searched as coral's)", low=0, search=(1e-1, 10), log=True),
    }

    def penalty(self, features: Sequence[Tensor]) -> Tensor:
        """Return how far the covariances of the features (n, d) of the domains differ."""
        return deep_coral_penalty(features)
