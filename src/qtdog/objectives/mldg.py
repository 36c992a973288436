"""Meta-learning for domain generalization."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective
from qtdog.objectives.functional import add_, loss_and_gradients, moved, random_ring, with_gradients


@OBJECTIVES.register("mldg")
class MLDG(Objective):
    """A step on one domain that also helps another: MLDG, first order (Li et al., AAAI 2018, Algorithm 1 and Eq. 3).

    The domains stand on a ring in random order; for each neighbors i, j: L_ij = L_i(θ) + β · L_j(θ − α · ∇L_i(θ)), and
    L is the mean over these pairs. As in DomainBed second derivatives are left out: the gradient of the second term is
    ∇L_j at the moved parameters (quantizers pass no second derivative either).

    The inner step is gradient descent over everything that trains, latent weights and step sizes alike, as in the
    paper. DomainBed takes a first step of Adam there, which is the sign of the gradient times the learning rate, and in
    its later versions splits the domains into `n_meta_test` against the rest. The default of `inner_lr` is ours.

    It runs the plain network itself: one process only, and in float32 also in a run of lower precision.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "beta": HyperParameter(1.0, "β, weight of the loss after the inner step", low=0, search=(1e-1, 10), log=True),
        "inner_lr": HyperParameter(0.01, "α, learning rate of the inner step", low=0),
    }
    MIN_DOMAINS = 2
    ONE_PROCESS = True

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the loss of one step, a scalar that carries its gradients."""
        domains, parameters = list(batch.split()), view.parameters()
        pairs, beta = random_ring(len(domains)), self.number("beta")
        total: dict[str, Tensor] = {}
        losses = []
        for i, j in pairs:
            loss, gradient = loss_and_gradients(view, parameters, *domains[i])
            after = moved(parameters, gradient, self.number("inner_lr"))
            loss_after, gradient_after = loss_and_gradients(view, after, *domains[j])
            losses.append(loss + beta * loss_after)
            add_(total, gradient, 1 / len(pairs))
            add_(total, gradient_after, beta / len(pairs))
        return with_gradients(torch.stack(losses).mean(), parameters, total)
