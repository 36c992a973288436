"""MixStyle: mix the style of two images between the stages of the backbone (Zhou et al., ICLR 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Beta

from qtdog.core.errors import ModelError
from qtdog.core.feature_maps import Stage, Style, restyle, style
from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.models.feature_layer import FeatureLayer, ImageShape
from qtdog.models.network import Network
from qtdog.models.stages import find_stages


def mix_styles(features: Tensor, stage: Stage, weight: Tensor, partner: Tensor) -> Tensor:
    """Return the features with their style mixed with that of a partner.

    Formula, with μ and σ over the positions of an image, per channel:

        σ' = λ σ(x) + (1 - λ) σ(x̃),   μ' = λ μ(x) + (1 - λ) μ(x̃),   x' = σ' (x - μ(x)) / σ(x) + μ'

    The gradient does not pass through μ and σ. Source: Zhou et al., *Domain Generalization with MixStyle* (ICLR 2021).

    Args:
        features: a feature map of n images, laid out as `stage` says.
        stage: layout of the map.
        weight: λ of each image, shape (n,).
        partner: which image x̃ is, int64, shape (n,).

    Example:
        >>> tokens = Stage("blocks.0", n_channels=1, axis=2, ndim=3)
        >>> features = torch.tensor([[[0.0], [2.0]], [[10.0], [14.0]]])
        >>> mixed = mix_styles(features, tokens, weight=torch.tensor([0.5, 1.0]), partner=torch.tensor([1, 0]))
        >>> mixed.flatten(1)
        tensor([[ 5.0000,  8.0000],
                [10.0000, 14.0000]])
    """
    own = style(features.detach(), stage.positions)
    share = weight.to(own.mean.dtype).reshape(-1, *[1] * (features.ndim - 1))
    mixed = (share * value + (1 - share) * value[partner] for value in own)
    return restyle(features, own, Style(*mixed))


@dataclass(frozen=True)
class _Mixing:
    """The forward hook of one stage: stateless, so that it survives a copy and is no part of the state dict."""

    stage: Stage
    p: float
    alpha: float

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        # The first draw is on the CPU: one that lies elsewhere would have to be waited for.
        if not module.training or torch.rand(()).item() >= self.p:
            return None
        n, device = len(output), output.device
        concentration = torch.full((n,), self.alpha, device=device)
        weight = Beta(concentration, concentration).sample()
        return mix_styles(output, self.stage, weight, torch.randperm(n, device=device))


class MixStyle(FeatureLayer):
    """Mix the styles of random pairs of images, in training only (Zhou et al., ICLR 2021); nothing of it ships.

    After each of the first stages, with probability p per batch, every image gets the style that `mix_styles` mixes
    with weight λ ~ Beta(α, α) from its own and that of a random image of the batch (the paper's variant without domain
    labels). Never after the last stage: there the style says what the image shows.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "p": HyperParameter(0.5, "probability that a stage mixes, drawn for each batch", low=0, high=1),
        "alpha": HyperParameter(0.1, "of Beta(alpha, alpha), from which the weight of each image is drawn", 1e-3, 100),
        "n_stages": HyperParameter(3, "after how many stages, from the first on", low=1, high=16),
    }

    def install_(self, network: Network, image_shape: ImageShape) -> None:
        """Hook the stages of a network.

        Raises:
            ModelError: the backbone has no stages, or but one.
        """
        stages = find_stages(network, image_shape)
        if len(stages) < 2:
            text = "this backbone has one stage only, and MixStyle goes between stages"
            raise ModelError(f"{text}: take another backbone, or --set model.feature_layer=none.")
        for stage in stages[:-1][: int(self.params["n_stages"])]:
            mixing = _Mixing(stage, float(self.params["p"]), float(self.params["alpha"]))
            network.get_submodule(stage.name).register_forward_hook(mixing)
