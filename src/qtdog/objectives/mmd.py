"""Maximum mean discrepancy with Gaussian kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainOutputs, Objective
from qtdog.objectives.functional import domain_losses, mean_over_pairs

GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # DomainBed's inverse bandwidths


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy of two sets of features.

    Formula: mean k(x, x') + mean k(y, y') − 2 mean k(x, y) over all pairs, each image with itself included, with the
    kernel k(x, y) = Σ_γ exp(−γ ‖x − y‖²) over `GAMMAS`. Source: Gretton et al., JMLR 2012, Eq. 5 (the biased estimate),
    with DomainBed's kernel.

    Args:
        x: shape (n, d).
        y: shape (m, d).

    Returns:
        A scalar, not negative but for rounding.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> mmd(x, x).item(), round(mmd(x, x + 1000).item(), 4)  # (7 + 3.2618) / 2, twice
        (0.0, 10.2618)
    """
    return _mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y)


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    # By differences, not by ‖x‖² + ‖y‖² − 2xy: γ = 1000 would show what cancels there.
    squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.stack([torch.exp(-gamma * squared).mean() for gamma in GAMMAS]).sum()


@OBJECTIVES.register("mmd")
class MMD(Objective):
    """Alignment of the features' distributions by their maximum mean discrepancy (Li et al., CVPR 2018).

    L = mean over domains of CE + weight · mean over pairs of domains of `mmd` of the penultimate features. As in
    DomainBed, without the paper's autoencoder and adversary.
    """

    MEAN_CROSS_ENTROPY: ClassVar[str] = "domains"
    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1.0, "of the discrepancy (mmd_gamma)", low=0, search=(1e-1, 10), log=True),
    }
    MIN_DOMAINS = 2

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss of the outputs of all source domains."""
        penalty = mean_over_pairs(mmd, [domain.features for domain in domains])
        return domain_losses(domains).mean() + self.number("weight") * penalty
