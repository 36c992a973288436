"""SagNet: rely on content, not on style (Nam et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from qtdog.core.errors import ConfigError
from qtdog.core.feature_maps import Stage, Style, restyle, style
from qtdog.core.registry import HyperParameter, HyperParameters, Value
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, Objective, ObjectiveSetting
from qtdog.objectives.functional import at_stages, linear_head

MAP_STAGE = 3  # the paper randomizes behind the third stage of a ResNet


def style_randomized(features: Tensor, dims: Sequence[int], share: Tensor, partner: Tensor) -> Tensor:
    """Return the features with their own content, and a style between their own and their partner's.

    Formula: with μ, σ over `dims`, σ'² = α σ(x)² + (1 - α) σ(x̃)², μ' = α μ(x) + (1 - α) μ(x̃),
    x' = σ' (x - μ) / σ + μ'. Source: Nam et al., *Reducing Domain Gap by Reducing Style Bias* (CVPR 2021), as in
    DomainBed, which mixes variances where the paper mixes standard deviations.

    Args:
        features: of n images.
        dims: dimensions that the style is taken over.
        share: α of each image, shape (n,).
        partner: which image x̃ is, int64, shape (n,).

    Example:
        >>> features = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
        >>> style_randomized(features, [1], share=torch.zeros(2), partner=torch.tensor([0, 0]))[0]
        tensor([1., 3.])
    """
    own = style(features, dims)
    alpha = share.to(own.mean.dtype).reshape(-1, *[1] * (features.ndim - 1))
    mean = alpha * own.mean + (1 - alpha) * own.mean[partner]
    var = alpha * own.std**2 + (1 - alpha) * own.std[partner] ** 2
    return restyle(features, own, Style(mean, var.sqrt()))


def content_randomized(features: Tensor, dims: Sequence[int], partner: Tensor) -> Tensor:
    """Return the features with their own style, and the content of their partner, to which no gradient goes.

    Formula: x' = σ(x) (x̃ - μ(x̃)) / σ(x̃) + μ(x). Source: Nam et al. (CVPR 2021), as in DomainBed.

    Example:
        >>> features = torch.tensor([[1.0, 3.0], [14.0, 10.0]])
        >>> content_randomized(features, [1], partner=torch.tensor([1, 0])).round(decimals=3)
        tensor([[ 3.,  1.],
                [10., 14.]])
    """
    own = style(features, dims)
    content = ((features - own.mean) / own.std)[partner].detach()
    return content * own.std + own.mean


def uniformity_loss(logits: Tensor) -> Tensor:
    """Return the mean cross-entropy between the uniform distribution and the softmax of `logits` (n, n_classes).

    Formula: −1/n · Σ_i 1/K · Σ_k log softmax(z_i)[k], at least log K. Source: Nam et al. (CVPR 2021).

    Example:
        >>> round(uniformity_loss(torch.zeros(3, 4)).item(), 4)  # log 4
        1.3863
    """
    return -logits.log_softmax(dim=1).mean()


@OBJECTIVES.register("sagnet")
class SagNet(Objective):
    """Classify under random styles; let nothing be read off the style alone (Nam et al., CVPR 2021).

    L = CE(c(SR(f)), y) + CE(s(CR(f)), y) + weight · uniformity(s(CR(f)))

    with SR and CR as in `style_randomized` and `content_randomized`. c is the network's classifier, s a linear head of
    its own on the style, which is never saved in the model file. The second term trains s alone, the third the
    featurizer alone.

    `level` says where the style is: "vector", over the penultimate features of an image as DomainBed has it, or "map",
    per channel over the positions behind the third stage, as the paper has it. There s sees the means and standard
    deviations (swapping contents does not change them), where the paper has a copy of the later stages.

    DomainBed has three optimizers that step one after the other, the last with draws of its own. Here it is one loss,
    one step and one draw: the featurizer follows the sum of its two gradients, which Adam scales together.

    Raises:
        ConfigError: `level` is "map" and the backbone has fewer than four stages.
        ModelError: `level` is "map" and the backbone has no stages.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "weight": HyperParameter(0.1, "of the adversarial term (sag_w_adv)", low=0, search=(1e-2, 10), log=True),
        "level": HyperParameter(
            "vector", "where the style is: of the features as a vector, or of a map", choices=("vector", "map")
        ),
    }
    ONE_PROCESS = True

    def __init__(self, setting: ObjectiveSetting, params: Mapping[str, Value]) -> None:
        super().__init__(setting, params)
        self.stage = _map_stage(setting) if self.params["level"] == "map" else None
        n_inputs = setting.n_features if self.stage is None else 2 * self.stage.n_channels
        self.style_head = linear_head(n_inputs, setting.n_classes, setting.seed, "style head")

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        n, device = len(batch.labels), batch.labels.device
        share, partner = torch.rand(n, device=device), torch.randperm(n, device=device)
        if self.stage is None:
            features, _ = view(batch.images)
            logits = view.classify(style_randomized(features, [1], share, partner))
            styles = content_randomized(features, [1], torch.randperm(n, device=device))
        else:
            logits, styles = self._through_map(view, batch.images, share, partner)
        frozen = {name: value.detach() for name, value in self.style_head.named_parameters()}
        adversarial = uniformity_loss(functional_call(self.style_head, frozen, (styles,)))
        style_loss = cross_entropy(self.style_head(styles.detach()), batch.labels)
        return cross_entropy(logits, batch.labels) + style_loss + self.number("weight") * adversarial

    def _through_map(self, view: ModelView, images: Tensor, share: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits under random styles of the map, and the style of each image (n, 2 C)."""
        styles: list[Tensor] = []

        def act(stage: Stage, features: Tensor) -> Tensor:
            styles.append(torch.cat([value.flatten(1) for value in style(features, stage.positions)], dim=1))
            return style_randomized(features, stage.positions, share, partner)

        assert self.stage is not None
        with at_stages(view.network, [self.stage], act):
            _, logits = view(images)
        return logits, styles[0]


def _map_stage(setting: ObjectiveSetting) -> Stage:
    stages = setting.stages()
    if len(stages) <= MAP_STAGE:
        text = f"objective 'sagnet' with level=map works behind stage {MAP_STAGE} of at least {MAP_STAGE + 1}"
        raise ConfigError(f"{text}, this backbone has {len(stages)}: take level=vector, or another backbone.")
    return stages[MAP_STAGE - 1]
