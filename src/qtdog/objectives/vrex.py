"""Variance risk extrapolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainBatch, DomainOutputs, ModelView, Objective
from qtdog.objectives.functional import domain_losses


def vrex_loss(domains: Sequence[DomainOutputs], weight: float) -> Tensor:
    """Return mean_d L_d + weight · mean_d (L_d − mean L)², over the cross-entropies L_d of the domains.

    Source: V-REx (Krueger et al., ICML 2021), with the mean of the risks where the paper has their sum, as in
    DomainBed.

    Args:
        domains: outputs of each domain; features are not read.
        weight: of the variance, β in the paper.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> sure, unsure = torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2)  # losses 0 and log 2
        >>> vrex_loss([DomainOutputs(z, z, torch.tensor([0])) for z in (sure, unsure)], 10.0)  # 0.3466 + 10 · 0.1201
        tensor(1.5477)
    """
    losses = domain_losses(domains)
    return losses.mean() + weight * losses.var(correction=0)


@OBJECTIVES.register("vrex")
class VREx(Objective):
    """Variance of the domains' losses as a penalty: V-REx (Krueger et al., ICML 2021).

    The weight of the variance is 1 for the first `anneal_steps` steps and `weight` after them; as in DomainBed, which
    also starts Adam anew when the weight jumps. An objective knows no optimizer, so here Adam goes on with the moments
    that it has.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(
            10.0, "of the variance after annealing (vrex_lambda)", low=0, search=(1e-1, 1e5), log=True
        ),
        "anneal_steps": HyperParameter(
            500, "steps with weight 1 before (vrex_penalty_anneal_iters)", low=0, search=(1, 1e4), log=True
        ),
    }
    MIN_DOMAINS = 2

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        weight = self.number("weight") if batch.step >= self.number("anneal_steps") else 1.0
        return vrex_loss(view.outputs(batch), weight)
