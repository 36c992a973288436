"""What goes around the loss of another objective: a teacher, smoothed labels, AugMix's consistency between views."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import (
    N_VIEWS,
    DomainBatch,
    DomainOutputs,
    ModelView,
    Objective,
    ObjectiveSetting,
    WrappedObjective,
)
from qtdog.objectives.functional import linear_head


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


class BatchTeacher(ABC):
    """A teacher with an input of its own, and features; abstract.

    Attributes:
        n_features: d, the width of its features.
    """

    n_features: int

    @abstractmethod
    def features(self, batch: DomainBatch) -> Tensor:
        """Return features (n, d) for the images of a batch, without gradients, on their device."""

    @abstractmethod
    def logits(self, batch: DomainBatch) -> Tensor:
        """Return logits (n, n_classes), likewise."""


Teacher = Callable[[Tensor], Tensor] | BatchTeacher
"""Normalized images (n, C, H, W) → logits (n, n_classes), without gradients, on their device; or a `BatchTeacher`."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over images.

    Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, section 2; the factor T² keeps
    the size of the gradients whatever the temperature.

    Args:
        student: logits, shape (n, n_classes).
        teacher: logits, shape (n, n_classes).
        temperature: T.

    Example:
        >>> same = distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]]), 2.0)
        >>> abs(same.item()) < 1e-6
        True
    """
    target = functional.log_softmax(teacher / temperature, dim=1)
    given = functional.log_softmax(student / temperature, dim=1)
    return temperature**2 * functional.kl_div(given, target, reduction="batchmean", log_target=True)


class Distill(WrappedObjective):
    """w · T² KL(teacher ‖ student) + (1 - w) · objective, both from one pass of the student.

    The teacher sees the very images that the student sees, augmentation included (consistent teaching: Beyer et al.,
    CVPR 2022, section 3).

    Args:
        objective: the loss of the labels; a pure one, which looks only at features, logits and labels.
        teacher: gives the soft targets.
        weight: w, from 0 to 1.
        temperature: T.

    Raises:
        ConfigError: the objective runs the model itself.
    """

    def __init__(self, objective: Objective, teacher: Teacher, *, weight: float, temperature: float) -> None:
        super().__init__(objective, "and cannot have a teacher beside it")
        self.weight = weight
        self.temperature = temperature
        self._teacher = teacher

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the weighted sum of both losses."""
        domains, teacher = view.own_outputs(batch), self._teacher
        with torch.no_grad():
            teacher_logits = teacher(batch.images) if not isinstance(teacher, BatchTeacher) else teacher.logits(batch)
        student = torch.cat([domain.logits for domain in domains])
        soft = distillation_loss(student.float(), teacher_logits.float(), self.temperature)
        return self.weight * soft + (1 - self.weight) * self.loss(view.joined(domains))


def feature_distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Return how far a student's features are from a teacher's, the mean over images.

    Formula: "cosine" 1 − s·t / (‖s‖ ‖t‖); "l2" 1/d ‖s − t‖² (Romero et al., FitNets, ICLR 2015, over the width).

    Args:
        student: shape (n, d), of the adapter.
        teacher: shape (n, d).
        kind: "cosine" or "l2".

    Example:
        >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> feature_distance(one, other, "cosine").item(), feature_distance(one, other, "l2").item()
        (1.0, 2.5)
    """
    if kind == "cosine":
        return (1 - functional.cosine_similarity(student, teacher, dim=1)).mean()
    return (student - teacher).square().mean()


class FeatureDistill(Distill):
    """w · distance(adapter(student's features), teacher's) + (1 - w) · objective, from one pass of the student.

    The adapter is a linear layer that trains with the student and is not shipped.

    Args:
        objective: as in `Distill`.
        teacher: gives the features.
        weight: w, from 0 to 1.
        kind: "cosine" or "l2".
        setting: of the run; gives the width of the student's features and the seed of the adapter's start.

    Raises:
        ConfigError: the objective runs the model itself, or several processes share the batch.
    """

    def __init__(
        self, objective: Objective, teacher: BatchTeacher, *, weight: float, kind: str, setting: ObjectiveSetting
    ) -> None:
        super().__init__(objective, teacher, weight=weight, temperature=1.0)
        if setting.n_processes > 1:
            raise ConfigError(
                "the adapter of a teacher's features trains in one process only; take teacher_mode=logits"
            )
        self.kind, self._features = kind, teacher.features
        self.adapter = linear_head(setting.n_features, teacher.n_features, setting.seed, "adapter")

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the weighted sum of both losses."""
        domains = view.own_outputs(batch)
        student = self.adapter(torch.cat([domain.features for domain in domains]).float())
        distance = feature_distance(student, self._features(batch).float(), self.kind)
        return self.weight * distance + (1 - self.weight) * self.loss(view.joined(domains))
