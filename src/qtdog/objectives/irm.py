"""Invariant risk minimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.objectives.base import OBJECTIVES, DomainBatch, DomainOutputs, ModelView, Objective
from qtdog.objectives.functional import domain_losses


def scale_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the derivative of the mean cross-entropy of w · logits with respect to the number w, at w = 1.

    Formula: 1/n · Σ_i (Σ_c softmax(z_i)[c] · z_i[c] − z_i[y_i]).

    Args:
        logits: z, shape (n, n_classes).
        labels: y, int64, shape (n,).

    Returns:
        A scalar, differentiable with respect to `logits`.

    Example:
        >>> logits, w = torch.tensor([[2.0, 0.0]]), torch.tensor(1.0, requires_grad=True)
        >>> torch.nn.functional.cross_entropy(w * logits, torch.tensor([0])).backward()
        >>> torch.allclose(scale_gradient(logits, torch.tensor([0])), w.grad)
        True
    """
    expected = (logits.softmax(1) * logits).sum(1)
    return (expected - logits.gather(1, labels[:, None]).squeeze(1)).mean()


def irm_penalty(domains: Sequence[DomainOutputs]) -> Tensor:
    """Return the mean over domains of g(even images) · g(odd images), with g the `scale_gradient`.

    The product over two halves of a domain's images is an unbiased estimate of g², the penalty of IRMv1 (Arjovsky et
    al., 2019), and may be negative. As in DomainBed.

    Args:
        domains: outputs of each domain, two or more images each; features are not read.

    Returns:
        A scalar.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> irm_penalty([DomainOutputs(logits, logits, torch.tensor([0, 0]))])  # (-0.2384)²
        tensor(0.0568)
    """
    halves = [[scale_gradient(domain.logits[k::2], domain.labels[k::2]) for k in (0, 1)] for domain in domains]
    return torch.stack([even * odd for even, odd in halves]).mean()


@OBJECTIVES.register("irm")
class IRM(Objective):
    """Invariant risk minimization: one classifier optimal in every domain (Arjovsky et al., 2019).

    L = mean over domains of [CE + w · penalty], with `irm_penalty`, and w = 1 for the first `anneal_steps` steps,
    `weight` after them; as in DomainBed, which also starts Adam anew when the weight jumps. An objective knows no
    optimizer, so here Adam goes on with the moments that it has.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(
            100.0, "of the penalty after annealing (irm_lambda)", low=0, search=(1e-1, 1e5), log=True
        ),
        "anneal_steps": HyperParameter(
            500, "steps with weight 1 before (irm_penalty_anneal_iters)", low=0, search=(1, 1e4), log=True
        ),
    }
    MIN_DOMAINS = 2
    MIN_BATCH = 2

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        domains = view.outputs(batch)
        weight = self.number("weight") if batch.step >= self.number("anneal_steps") else 1.0
        return domain_losses(domains).mean() + weight * irm_penalty(domains)
