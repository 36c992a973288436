"""From the name of a backbone to a module that maps images to features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import Tensor, nn

from qtdog.core.errors import ModelError
from qtdog.models.digits_cnn import WIDTHS, digits_cnn


@dataclass(frozen=True)
class FeaturizerSpec:
    """What decides the shapes of a featurizer.

    Attributes:
        backbone: a timm name, with or without the tag of its weights, or a name in `digits_cnn.WIDTHS`.
        channels: of the images.
        image_size: height and width of the images in pixels.
    """

    backbone: str
    channels: int
    image_size: int

    @property
    def is_timm(self) -> bool:
        """Whether timm builds it."""
        return self.backbone not in WIDTHS


def pretrained_cfg(backbone: str) -> PretrainedCfg:
    """Return timm's description of a backbone's weights; a neutral one (ImageNet's mean and std) if timm has none."""
    return timm.get_pretrained_cfg(backbone) or PretrainedCfg()


def build_featurizer(
    spec: FeaturizerSpec, *, pretrained: bool = False, state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a featurizer; images (n, channels, size, size) → features (n, d).

    Args:
        spec: which one.
        pretrained: let timm load the weights: from its hub, or from `state`.
        state: a complete state dict of the timm model, head included, that stands in for the hub's.

    Raises:
        ModelError: the backbone cannot be built for images of that size.
    """
    if not spec.is_timm:
        return digits_cnn(WIDTHS[spec.backbone], channels=spec.channels)
    options: dict[str, Any] = {}
    if pretrained_cfg(spec.backbone).fixed_input_size:  # transformers and their kin: position tables have a size
        options["img_size"] = spec.image_size
    if state is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": dict(state)}
    try:
        return timm.create_model(spec.backbone, pretrained=pretrained, num_classes=0, in_chans=spec.channels, **options)
    except (AssertionError, ValueError) as error:
        raise wrong_size(spec, error) from error


def wrong_size(spec: FeaturizerSpec, reason: Exception) -> ModelError:
    """Return the error for a backbone that cannot take such images."""
    own = (pretrained_cfg(spec.backbone).input_size or (3, 224, 224))[-1]
    shape = f"{spec.channels} × {spec.image_size} × {spec.image_size}"
    said = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    return ModelError(
        f"backbone '{spec.backbone}' cannot take images of {shape} ({said}). "
        f"Try --image-size {own}, or another backbone."
    )
