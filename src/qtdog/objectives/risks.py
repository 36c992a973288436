"""Losses of the domains' risks alone: ERM, and IRM, V-REx and GroupDRO, which want them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, DomainOutputs, ModelView, Objective, ObjectiveSetting
from qtdog.objectives.functional import domain_losses


def erm_loss(domains: Sequence[DomainOutputs]) -> Tensor:
    """Return the mean cross-entropy over the images of all domains.

    Formula: L = 1/n · Σ_i −log softmax(z_i)[y_i]. Source: Vapnik, *Statistical Learning Theory*, 1998; as in DomainBed
    (Gulrajani and Lopez-Paz, ICLR 2021), where every image of the joined batch weighs the same.

    Args:
        domains: outputs of each source domain; features are not read.

    Returns:
        A scalar.

    Example:
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> round(erm_loss([DomainOutputs(logits, logits, labels)]).item(), 4)  # log 4
        1.3863
    """
    logits = torch.cat([domain.logits for domain in domains])
    labels = torch.cat([domain.labels for domain in domains])
    return functional.cross_entropy(logits, labels)


@OBJECTIVES.register("erm")
class ERM(Objective):
    """Mean cross-entropy over all images (Vapnik, 1998)."""

    ACCUMULATES: ClassVar[str | None] = "images"
    MEAN_CROSS_ENTROPY: ClassVar[str] = "images"

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return `erm_loss`."""
        return erm_loss(domains)


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


class AnnealedPenalty(Objective):
    """A penalty whose weight is 1 for the first `anneal_steps` steps and `weight` after them; abstract.

    As in DomainBed, which also starts Adam anew when the weight jumps. An objective knows no optimizer, so here Adam
    goes on with the moments that it has.
    """

    ACCUMULATES: ClassVar[str | None] = "outputs"
    MIN_DOMAINS: ClassVar[int] = 2

    def weight_at(self, step: int) -> float:
        """Return the weight of the penalty at a step."""
        return self.number("weight") if step >= self.number("anneal_steps") else 1.0


@OBJECTIVES.register("irm")
class IRM(AnnealedPenalty):
    """Invariant risk minimization: one classifier optimal in every domain (Arjovsky et al., 2019).

    L = mean over domains of [CE + w · penalty], with `irm_penalty` and the weight w of `AnnealedPenalty`.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(
            100.0, "of the penalty after annealing (irm_lambda)", low=0, search=(1e-1, 1e5), log=True
        ),
        "anneal_steps": HyperParameter(
            500, "steps with weight 1 before (irm_penalty_anneal_iters)", low=0, search=(1, 1e4), log=True
        ),
    }
    MIN_BATCH = 2

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        domains = view.outputs(batch)
        return domain_losses(domains).mean() + self.weight_at(batch.step) * irm_penalty(domains)


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
class VREx(AnnealedPenalty):
    """Variance of the domains' losses as a penalty: V-REx (Krueger et al., ICML 2021).

    The weight of the variance is that of `AnnealedPenalty`.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(
            10.0, "of the variance after annealing (vrex_lambda)", low=0, search=(1e-1, 1e5), log=True
        ),
        "anneal_steps": HyperParameter(
            500, "steps with weight 1 before (vrex_penalty_anneal_iters)", low=0, search=(1, 1e4), log=True
        ),
    }

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        return vrex_loss(view.outputs(batch), self.weight_at(batch.step))


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

    ACCUMULATES: ClassVar[str | None] = "outputs"
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
