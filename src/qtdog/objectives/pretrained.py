"""Objectives that keep what the pretrained network knows: its features (MIRO), the meaning of classes (MMS)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, softplus

from qtdog.core.errors import ConfigError
from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, DomainOutputs, ModelView, Objective, ObjectiveSetting
from qtdog.objectives.functional import kept_at_stages
from qtdog.objectives.risks import erm_loss

START_VARIANCE = 0.1
MIN_VARIANCE = 1e-5


def miro_penalty(features: Sequence[Tensor], pretrained: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    """Return how far the features are from what the pretrained network says, by stage and channel.

    Formula, over the stages l, the mean over images, positions and channels:

        Σ_l ½ · mean(log σ²_l + (f_l - f⁰_l)² / σ²_l)

    Source: Cha et al., *Domain Generalization by Mutual-Information Regularization with Pre-trained Models* (ECCV
    2022), with the identity as mean encoder and a diagonal, constant variance: an upper bound, up to a constant, of the
    entropy of f⁰ given f.

    Args:
        features: f_l of each stage.
        pretrained: f⁰_l of each stage, of the same shapes.
        variances: σ²_l of each stage, of shapes that broadcast over the features.

    Returns:
        A scalar.

    Example:
        >>> features, pretrained = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> miro_penalty([features], [pretrained], [torch.ones(1, 2)]).item()
        0.25
    """
    terms = [
        (variance.log() + (ours - theirs) ** 2 / variance).mean() / 2
        for ours, theirs, variance in zip(features, pretrained, variances, strict=True)
    ]
    return torch.stack(terms).sum()


@OBJECTIVES.register("miro")
class MIRO(Objective):
    """Cross-entropy + weight · closeness to the pretrained features at every stage (Cha et al., ECCV 2022).

    The variance encoder of a stage is softplus(b) + 1e-5, one b per channel, and starts at 0.1; it learns at ten times
    the learning rate. f⁰ comes from a copy of the network as it starts, in evaluation mode: it never trains, is in no
    checkpoint, and is made anew from the pretrained weights when a run goes on. The stages are those of
    `models.feature_layers.find_stages`; the authors' code adds the stem.

    The paper's weights: 0.01 for PACS and VLCS, 0.1 for OfficeHome, TerraIncognita and DomainNet. Without pretrained
    weights (`--weights none`) the method holds the network at a random start, which makes no sense.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(0.1, "of the regularization (λ, ld)", low=0, search=(1e-3, 1), log=True),
    }
    ONE_PROCESS = True
    lr_factor = 10.0

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        self.stages = tuple(setting.stages())
        start = math.log(math.expm1(START_VARIANCE - MIN_VARIANCE))  # the inverse of softplus
        self.raw_variances = nn.ParameterList([torch.full((stage.n_channels,), start) for stage in self.stages])
        # In a tuple it is no submodule: neither optimizer nor checkpoint nor train() shall find it.
        self._pretrained = (copy.deepcopy(setting.network).eval().requires_grad_(False),)

    @property
    def pretrained(self) -> nn.Module:
        """The frozen copy of the network as it started."""
        return self._pretrained[0]

    def variances(self) -> list[Tensor]:
        """Return the variance of each stage, of a shape that broadcasts over its feature map."""
        pairs = zip(self.stages, self.raw_variances, strict=True)
        return [stage.spread(softplus(raw) + MIN_VARIANCE) for stage, raw in pairs]

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        with kept_at_stages(view.network, self.stages) as features:
            outputs = view.outputs(batch)
        with torch.no_grad(), kept_at_stages(self.pretrained, self.stages) as pretrained:
            self.pretrained(batch.images)
        return erm_loss(outputs) + self.number("weight") * miro_penalty(features, pretrained, self.variances())


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
