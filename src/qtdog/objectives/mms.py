"""Margin metric softmax: classes far apart in meaning are to be far apart in score (CLIPood)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from qtdog.core.errors import ConfigError
from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainOutputs, Objective, ObjectiveSetting


def class_margins(weight: Tensor) -> Tensor:
    """Return how far apart classes are, in the unit of the logits, shape (n_classes, n_classes).

    Formula: m_yc = s · (1 − cos(w_y, w_c)), with w_c the weight of class c and s the mean length of the rows. Where the
    rows are CLIP's text embeddings times its scale, s is that scale. Source: CLIPood (Shu et al., ICML 2023).

    Args:
        weight: of a linear classifier, shape (n_classes, d).

    Example:
        >>> class_margins(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([[0., 2.],
                [2., 0.]])
    """
    directions = normalize(weight.detach(), dim=1)
    margins = weight.detach().norm(dim=1).mean() * (1 - directions @ directions.T)
    return margins.fill_diagonal_(0)  # exactly, where rounding would leave a little


def mms_loss(domains: Sequence[DomainOutputs], margins: Tensor) -> Tensor:
    """Return the mean cross-entropy over all images, with the logit of each wrong class raised by its margin.

    Formula: L = 1/n · Σ_i −log softmax(z_i + m[y_i])[y_i]. Source: CLIPood (Shu et al., ICML 2023), margin metric
    softmax; the authors' code subtracts λ · t_y from the image embedding before CLIP's scale, which is the same.

    Args:
        domains: outputs of each domain; features are not read.
        margins: by true and other class, zero where they are the same, shape (n_classes, n_classes).

    Returns:
        A scalar.

    Example:
        >>> logits, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> margins = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> round(mms_loss([DomainOutputs(logits, logits, labels)], margins).item(), 4)  # the margin makes both even
        0.6931
    """
    logits = torch.cat([domain.logits for domain in domains])
    labels = torch.cat([domain.labels for domain in domains])
    return cross_entropy(logits + margins[labels], labels)


@OBJECTIVES.register("mms")
class MMS(Objective):
    """Margin metric softmax: cross-entropy with margins between classes that differ in meaning (Shu et al., ICML 2023).

    A wrong class counts as if its logit were higher by weight · `class_margins` of the classifier as it starts. That
    says something about the classes where it starts at their names (`model.head=text`); a classifier that starts at
    random has nearly the same margin between any two classes.

    Raises:
        ConfigError: the classifier is not linear.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(0.3, "of the margins (lambda)", low=0),
    }

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        classifier = getattr(setting.network, "classifier", None)
        if not isinstance(classifier, nn.Linear):
            text = "objective 'mms' takes its margins from the rows of a linear classifier, and this network has none"
            raise ConfigError(f"{text}. Use another objective, such as erm.")
        self.margins: Tensor
        self.register_buffer("margins", self.number("weight") * class_margins(classifier.weight))

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return `mms_loss`."""
        return mms_loss(domains, self.margins)
