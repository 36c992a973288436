"""What a model, single or an ensemble, answers on images, and how far the answers can be trusted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtdog.core.errors import ConfigError
from qtdog.ensemble.calibration import brier_score, expected_calibration_error
from qtdog.ensemble.model import EnsembleModel
from qtdog.ensemble.selective import risk_coverage
from qtdog.ensemble.uncertainty import Doubt, doubt
from qtdog.training.load import ShippedModel

KEPT_COVERAGE = 0.9  # of the risk that is reported: the least certain tenth is not answered


@dataclass(frozen=True)
class Answers:
    """Answers on n images.

    Attributes:
        probabilities: softmax of the mean logits at the model's temperature, shape (n, n_classes).
        doubt: of each image; for a single model its mutual information is 0 and its agreement 1.
    """

    probabilities: Tensor
    doubt: Doubt


@dataclass(frozen=True)
class Reliability:
    """How far the probabilities of answers can be trusted, from labelled images.

    Attributes:
        ece: expected calibration error, 15 bins of equal width.
        brier: Brier score, 0 … 2.
        aurc: area under the risk-coverage curve, by entropy.
        risk_at_90: share of wrong answers among the surest 90 %.
    """

    ece: float
    brier: float
    aurc: float
    risk_at_90: float


def temperature_of(model: ShippedModel | EnsembleModel) -> float:
    """Return the temperature of a model's probabilities: 1 for a single model."""
    return model.info.temperature if isinstance(model, EnsembleModel) else 1.0


@torch.no_grad()
def member_logits(model: ShippedModel | EnsembleModel, images: Tensor) -> Tensor:
    """Return the logits (members, n, n_classes) of normalised images (n, C, H, W); one member for a single model."""
    return model.member_logits(images) if isinstance(model, EnsembleModel) else model(images)[None]


def answers(logits: Tensor, temperature: float = 1.0) -> Answers:
    """Return probabilities and doubt of logits (members, n, n_classes).

    Example:
        >>> found = answers(torch.tensor([[[0.0, 0.0]], [[2.0, 2.0]]]))
        >>> found.probabilities.tolist(), round(found.doubt.entropy.item(), 4)
        ([[0.5, 0.5]], 0.6931)
    """
    return Answers((logits.mean(0) / temperature).softmax(-1), doubt(logits, temperature))


def reliability(found: Answers, labels: Tensor) -> Reliability:
    """Return how far answers can be trusted.

    Args:
        found: the answers on n images.
        labels: class indices, shape (n,).

    Raises:
        ConfigError: there are no images.

    Example:
        >>> sure = answers(torch.tensor([[[9.0, 0.0], [0.0, 9.0]]]))
        >>> reliability(sure, torch.tensor([0, 1])).risk_at_90
        0.0
    """
    if not len(labels):
        raise ConfigError("there are no labelled images to compare the probabilities with")
    correct = found.probabilities.argmax(1) == labels
    curve = risk_coverage(found.doubt.entropy.cpu().numpy(), correct.cpu().numpy())
    return Reliability(
        ece=expected_calibration_error(found.probabilities, labels),
        brier=brier_score(found.probabilities, labels),
        aurc=curve.area,
        risk_at_90=curve.risk_at(KEPT_COVERAGE),
    )


def collect(
    model: ShippedModel | EnsembleModel, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the logits (members, n, n_classes) and labels (n,) of all batches, on the CPU.

    Args:
        model: on `device`.
        batches: normalised images and labels.
        device: where to compute.
    """
    parts = [(member_logits(model, images.to(device)).float().cpu(), labels.cpu()) for images, labels in batches]
    return torch.cat([logits for logits, _ in parts], 1), torch.cat([labels for _, labels in parts])
