"""Group distributionally robust optimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective, ObjectiveSetting
from qtdog.objectives.functional import domain_losses


def reweighted(shares: Tensor, losses: Tensor, eta: float) -> Tensor:
    """Return q_d · exp(η · L_d), divided by its sum.

    Source: Sagawa et al., ICLR 2020, Algorithm 1.

    Args:
        shares: q, positive, shape (n_domains,).
        losses: L, shape (n_domains,).
        eta: η, the step size of q.

    Example:
        >>> reweighted(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]), eta=1.0)
        tensor([0.2689, 0.7311])
    """
    return (shares.log() + eta * losses).softmax(0)


@OBJECTIVES.register("groupdro")
class GroupDRO(Objective):
    """Losses of the domains, weighted towards the worst one: GroupDRO (Sagawa et al., ICLR 2020, Algorithm 1).

    L = Σ_d q_d · L_d, where q starts uniform and every step first multiplies each q_d by exp(η · L_d) and normalizes.
    The shares q are kept in checkpoints.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "eta": HyperParameter(0.01, "step size of the domains' shares", low=0, search=(1e-3, 1e-1), log=True),
    }
    MIN_DOMAINS = 2
    shares: Tensor

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        self.register_buffer("shares", torch.full((setting.n_domains,), 1 / setting.n_domains))

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step, after moving the shares."""
        losses = domain_losses(view.outputs(batch))
        if self.new_step(batch):
            self.remember_(self.shares, reweighted(self.shares, losses, self.number("eta")))
        return self.shares @ losses
