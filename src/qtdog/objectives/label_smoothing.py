"""Label smoothing, around any objective whose loss holds the mean cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import DomainOutputs, Objective, WrappedObjective


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
