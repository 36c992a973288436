"""What goes around the loss of another objective: smoothed labels, and AugMix's consistency between views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import N_VIEWS, DomainBatch, DomainOutputs, ModelView, Objective, WrappedObjective


def smoothing_term(domains: Sequence[DomainOutputs], over: str = "images") -> Tensor:
    """Return by how much the mean cross-entropy grows when labels become uniform over all K classes.

    Formula: mean over i of log p_i,y − 1/K Σ_k log p_ik. Label smoothing with share ε is the cross-entropy plus ε times
    this (Szegedy et al., CVPR 2016, section 7).

    Args:
        domains: outputs of each source domain.
        over: "images", of the joined batch, or "domains", of whose means it is the mean.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> smoothing_term([DomainOutputs(logits, logits, torch.tensor([0, 3]))])
        tensor(0.)
    """
    terms = []
    for domain in domains:
        log_p = functional.log_softmax(domain.logits, dim=1)
        own = log_p.gather(1, domain.labels[:, None]).squeeze(1)
        terms.append(own - log_p.mean(dim=1))
    return torch.cat(terms).mean() if over == "images" else torch.stack([term.mean() for term in terms]).mean()


class LabelSmoothing(WrappedObjective):
    """An objective whose mean cross-entropy is with labels of which a share ε is spread evenly over all classes.

    What else the objective adds (penalties on features) stays.

    Args:
        objective: one with `MEAN_CROSS_ENTROPY`.
        share: ε, 0 to 1.

    Raises:
        ConfigError: the objective's loss is not the mean cross-entropy with terms beside it.
    """

    def __init__(self, objective: Objective, share: float) -> None:
        if not objective.MEAN_CROSS_ENTROPY:
            name = type(objective).__name__
            raise ConfigError(
                f"objective '{name}' is not the mean cross-entropy with terms beside it, so labels cannot be smoothed "
                "(objective.label_smoothing is for erm, coral, deep-coral and mmd)"
            )
        super().__init__(objective, "and its labels cannot be smoothed")
        self.share = share

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the loss with smoothed labels."""
        return self.objective.loss(domains) + self.share * smoothing_term(domains, self.objective.MEAN_CROSS_ENTROPY)


def jensen_shannon(logits: Sequence[Tensor]) -> Tensor:
    """Return the Jensen-Shannon divergence of several predictions, the mean over images.

    Formula: 1/V Σ_v KL(p_v ‖ m), m = 1/V Σ_v p_v (Hendrycks et al., AugMix, ICLR 2020, Eq. 2).

    Args:
        logits: V tensors of shape (n, n_classes).

    Example:
        >>> jensen_shannon([torch.tensor([[0.0, 1.0]])] * 3)
        tensor(0.)
    """
    log_p = torch.stack([functional.log_softmax(one.float(), dim=1) for one in logits])
    log_mean = log_p.exp().mean(dim=0).clamp(1e-7, 1).log()  # cut as in the authors' code
    return (log_p.exp() * (log_p - log_mean)).sum(dim=2).mean()


class Consistency(WrappedObjective):
    """objective(clean images) + λ · JS(clean, two views), all from one pass over three times the images.

    Args:
        objective: the loss of the labels; a pure one, which looks only at features, logits and labels.
        weight: λ; 12 in the paper.

    Raises:
        ConfigError: the objective runs the model itself.
    """

    def __init__(self, objective: Objective, weight: float) -> None:
        super().__init__(objective, "and knows nothing of views")
        self.weight = weight

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the loss of the clean images and the divergence of their views (ValueError without views)."""
        if len(batch.views) != N_VIEWS:
            raise ValueError(f"a batch with {N_VIEWS} views of each image is needed, not {len(batch.views)}")
        features, logits = view(torch.cat([batch.images, *batch.views]))
        n = len(batch.images)
        whole = (features[:n], logits[:n], batch.labels)
        parts = zip(*(tensor.split(batch.sizes) for tensor in whole), strict=True)
        own = [DomainOutputs(*part) for part in parts]
        return self.loss(view.joined(own)) + self.weight * jensen_shannon(logits.split(n))
