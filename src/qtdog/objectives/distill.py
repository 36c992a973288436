"""Knowledge distillation: a student learns the answers of a teacher, beside any pure objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import DomainBatch, DomainOutputs, ModelView, Objective

Teacher = Callable[[Tensor], Tensor]
"""Normalized images (n, C, H, W) to logits (n, n_classes), without gradients, on the images' device."""


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


class Distill(Objective):
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
        torch.nn.Module.__init__(self)  # hyper-parameters and checks are those of the objective
        if type(objective).forward is not Objective.forward:
            name = type(objective).__name__
            raise ConfigError(f"objective '{name}' runs the model itself and cannot have a teacher beside it; use erm")
        self.objective = objective
        self.params = objective.params
        self.lr_factor = objective.lr_factor
        self.weight = weight
        self.temperature = temperature
        self._teacher = teacher

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the loss of the labels alone."""
        return self.objective.loss(domains)

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the weighted sum of both losses."""
        domains = view.own_outputs(batch)
        with torch.no_grad():
            teacher_logits = self._teacher(batch.images)
        student = torch.cat([domain.logits for domain in domains])
        soft = distillation_loss(student.float(), teacher_logits.float(), self.temperature)
        return self.weight * soft + (1 - self.weight) * self.loss(view.joined(domains))
