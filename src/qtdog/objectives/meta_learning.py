"""Objectives that learn to do well after a change: MLDG and Fish after inner steps, ARM with a domain's context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from qtdog.core.errors import ConfigError
from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective, ObjectiveSetting
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


@OBJECTIVES.register("arm")
class ARM(Objective):
    """Mean cross-entropy with the context of each domain beside its images (Zhang et al., NeurIPS 2021); needs context.

    The contextual meta-learning variant: L = 1/n · Σ_i −log p(y_i | x_i, c), where c is the mean of the context network
    over the images of the domain of x_i (`models.feature_layers`). The network is `--set model.feature_layer=context`,
    and is saved with the model. At test time the images that are given together are taken for one domain, so that a
    prediction depends on the others in its batch.

    Raises:
        ConfigError: the network has no context.
    """

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        if getattr(setting.network, "context", None) is None:
            text = "objective 'arm' learns from the context of a domain, and this network has none"
            raise ConfigError(f"{text}: add --set model.feature_layer=context.")

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step, from one pass in which the contexts of the domains do not mix."""
        with parametrize.cached():
            _, logits = view.model(batch.images, batch.sizes)
        return cross_entropy(logits, batch.labels)
