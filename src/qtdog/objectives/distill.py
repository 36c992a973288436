"""Knowledge distillation: a student learns the answers of a teacher, beside any pure objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import DomainBatch, ModelView, Objective, ObjectiveSetting, WrappedObjective
from qtdog.objectives.functional import linear_head


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
