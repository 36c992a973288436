"""Fishr: invariant variances of the classifier's gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, DomainOutputs, ModelView, Objective, ObjectiveSetting
from qtdog.objectives.erm import erm_loss


def gradient_variance(domain: DomainOutputs) -> Tensor:
    """Return the variance, over the images of a domain, of the gradient of each weight of the linear classifier.

    The cross-entropy of image i has the gradient e_i[c] · f_i[k], with the error e = softmax(z) − onehot(y) and the
    features f, to which a 1 is appended for the bias. Formula: mean_i (e_i[c]² · f_i[k]²) − (mean_i e_i[c] · f_i[k])²,
    which needs no tensor of shape (n, n_classes, d).

    Args:
        domain: its outputs.

    Returns:
        Shape (n_classes, d + 1), over n (not n − 1), the bias last, differentiable.

    Example:
        >>> logits, features = torch.zeros(2, 2), torch.tensor([[1.0], [3.0]])
        >>> # gradients -1/2 and -3/2 of the first class's weight, -1/2 and -1/2 of its bias
        >>> gradient_variance(DomainOutputs(features, logits, torch.tensor([0, 0])))
        tensor([[0.2500, 0.0000],
                [0.2500, 0.0000]])
    """
    errors = domain.logits.softmax(1) - one_hot(domain.labels, domain.logits.shape[1])
    inputs = pad(domain.features, (0, 1), value=1.0)
    n = len(inputs)
    return errors.square().T @ inputs.square() / n - (errors.T @ inputs / n).square()


def variance_penalty(variances: Tensor) -> Tensor:
    """Return the mean over domains and weights of (v_d − mean over domains of v)².

    Source: Ramé et al., ICML 2022, divided by the number of weights, as in DomainBed.

    Args:
        variances: v, shape (n_domains, …).

    Returns:
        A scalar.

    Example:
        >>> variance_penalty(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor(0.5000)
    """
    return variances.var(0, correction=0).mean()


@OBJECTIVES.register("fishr")
class Fishr(Objective):
    """Equal variances of the classifier's gradients in all domains: Fishr (Ramé et al., ICML 2022).

    L = CE + weight · `variance_penalty` of ṽ_d = v̄_d / (1 − ema), where v̄_d ← ema · v̄_d + (1 − ema) · v_d is the moving
    average, from 0, of `gradient_variance`. The gradient flows through the present v_d, and the division by 1 − ema
    makes it independent of `ema`. For the first `anneal_steps` steps the penalty does not count but the average
    moves. All of this as in DomainBed, which also starts Adam anew when the penalty sets in; an objective knows no
    optimizer, so here Adam goes on with the moments that it has.

    Where the classifier is quantized, its gradients are those of the quantized weights. The averages are kept in
    checkpoints.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(1000.0, "of the penalty (lambda)", low=0, search=(10, 1e4), log=True),
        "anneal_steps": HyperParameter(
            1500, "steps without penalty before (penalty_anneal_iters)", low=0, search=(0, 5000)
        ),
        "ema": HyperParameter(0.95, "decay of the average of variances", low=0, high=0.999, search=(0.9, 0.99)),
    }
    MIN_DOMAINS = 2
    MIN_BATCH = 2
    average: Tensor
    before: Tensor

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        zeros = torch.zeros(setting.n_domains, setting.n_classes, setting.n_features + 1)
        self.register_buffer("average", zeros)
        # of the step before, from which a second pass over a step starts again
        self.register_buffer("before", zeros.clone(), persistent=False)

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step, after moving the averages."""
        domains = view.outputs(batch)
        if self.new_step(batch):
            self.before.copy_(self.average)
        ema = self.number("ema")
        present = torch.stack([gradient_variance(domain) for domain in domains])
        average = ema * self.before + (1 - ema) * present
        self.remember_(self.average, average)
        loss = erm_loss(domains)
        if batch.step < self.number("anneal_steps"):
            return loss
        return loss + self.number("weight") * variance_penalty(average / (1 - ema))
