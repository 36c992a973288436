"""Fish: gradient matching between domains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective
from qtdog.objectives.functional import add_, loss_and_gradients, moved, with_gradients


@OBJECTIVES.register("fish")
class Fish(Objective):
    """Gradients of the domains that point the same way: Fish (Shi et al., ICLR 2022, Algorithm 1).

    From θ̃ = θ one step of gradient descent per domain, in random order: θ̃ ← θ̃ − α · ∇L_d(θ̃). Then the paper sets
    θ ← θ + ε · (θ̃ − θ). Here the optimizer makes the update, and gets as gradient ε · (θ − θ̃) / α, the sum of the
    gradients on the way times ε. The value of the loss is the mean of the domains' losses on the way.

    With SGD without momentum whose learning rate is `inner_lr`, the update is exactly the paper's. Another learning
    rate or optimizer scales it as it would any gradient; Adam, in particular, cancels ε. DomainBed takes a second Adam
    inside and keeps the domains in order. The default of `inner_lr` is ours.

    The inner steps move everything that trains, latent weights and step sizes alike. It runs the plain network itself:
    one process only, and in float32 also in a run of lower precision.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "meta_lr": HyperParameter(
            0.5,
            "ε, share of the way to go (DomainBed tries 0.05, 0.1, 0.5)",
            low=0,
            search=(0.05, 0.5),
            log=True,
        ),
        "inner_lr": HyperParameter(0.01, "α, learning rate of the inner steps", low=0),
    }
    MIN_DOMAINS = 2
    ONE_PROCESS = True

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the loss of one step, a scalar that carries its gradients."""
        domains, parameters = list(batch.split()), view.parameters()
        inner: Mapping[str, Tensor] = parameters
        total: dict[str, Tensor] = {}
        losses = []
        for index in torch.randperm(len(domains)).tolist():
            loss, gradient = loss_and_gradients(view, inner, *domains[index])
            inner = moved(inner, gradient, self.number("inner_lr"))
            losses.append(loss)
            add_(total, gradient, self.number("meta_lr"))
        return with_gradients(torch.stack(losses).mean(), parameters, total)
