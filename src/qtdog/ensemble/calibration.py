"""Calibration of probabilities: temperature scaling, expected calibration error, Brier score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

N_BINS = 15
# e^-3 … e^3: a network that needs more than 20 times cooler or hotter logits has no use for its probabilities
LOG_BOUND = 3.0


@dataclass(frozen=True)
class LabeledLogits:
    """Logits and labels of n images, on the CPU.

    Attributes:
        logits: of k models, shape (k, n, n_classes).
        labels: class indices, shape (n,).
    """

    logits: Tensor
    labels: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return the images of all parts, one or more, as one."""
        return cls(torch.cat([part.logits for part in parts], 1), torch.cat([part.labels for part in parts]))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T > 0 that minimizes the cross-entropy of softmax(logits / T).

    Source: Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, section 4.2. The loss is convex in 1/T,
    so that the search between e^-3 and e^3 finds its only minimum; accuracy does not change. To be fitted on held-out
    *source* images, never on the target.

    Args:
        logits: shape (n, n_classes).
        labels: class indices, shape (n,).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 4)
        >>> labels = torch.tensor([0, 0, 0, 1])  # right three times in four: the best odds are 3 to 1
        >>> round(fit_temperature(logits, labels), 3), round(2 / math.log(3), 3)
        (1.82, 1.82)
    """
    values = logits.detach().double().cpu()
    classes = labels.cpu()

    def loss(log_temperature: float) -> float:
        return functional.cross_entropy(values / math.exp(log_temperature), classes).item()

    found = minimize_scalar(loss, bounds=(-LOG_BOUND, LOG_BOUND), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, n_bins: int = N_BINS) -> float:
    """Return Σ_b n_b/n · abs(accuracy_b - confidence_b) over bins of equal width of the first choice's probability.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017, Eq. 3. Bin b holds confidences in (b/B, (b+1)/B]. The
    estimate is biased upwards for few images.

    Args:
        probabilities: shape (n, n_classes).
        labels: shape (n,).
        n_bins: B.

    Example:
        >>> sure = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
        >>> round(expected_calibration_error(sure, torch.tensor([0, 1])), 3)  # 90 % sure, right half of the time
        0.4
    """
    confidence, choice = probabilities.double().max(1)
    correct = (choice == labels).double()
    bins = (confidence * n_bins).ceil().long().sub(1).clamp(0, n_bins - 1)
    gaps = torch.zeros(n_bins, dtype=torch.float64, device=bins.device)
    gaps.index_add_(0, bins, correct - confidence)
    return (gaps.abs().sum() / len(labels)).item()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean over images of Σ_c (p_c - 1[c = label])²: 0 is perfect, 2 is the worst (Brier, 1950).

    Args:
        probabilities: shape (n, n_classes).
        labels: shape (n,).

    Example:
        >>> brier_score(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1]))
        0.25
    """
    truth = functional.one_hot(labels, probabilities.shape[1])
    return (probabilities.double() - truth).square().sum(1).mean().item()
