"""From the name of a backbone to a module that maps images, or text, to features; the small network for digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn.functional import normalize

from qtdog.core.errors import ModelError
from qtdog.core.registry import Registry
from qtdog.models.text_backbones import TEXT_BACKBONES, build_text_featurizer

# Backbones of plug-ins: (channels, image_size) → a module that maps images in [0, 1] to features (n, d).
OWN_BACKBONES: Registry[Callable[[int, int], nn.Module]] = Registry("backbone of a plug-in")
GROUPS = 8
# DomainBed's network, and the same at a quarter of the width for machines without an accelerator
WIDTHS = {"mnist_cnn": (64, 128, 128, 128), "digits_cnn": (16, 32, 32, 32)}


def digits_cnn(widths: Sequence[int], *, channels: int) -> nn.Sequential:
    """Return the featurizer: four times 3 × 3 convolution, ReLU, group norm; then the mean over all positions.

    Architecture of `MNIST_CNN` in DomainBed (Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR
    2021, appendix D.1), whose widths are 64, 128, 128, 128: the second convolution has stride 2, the group norms have 8
    groups and come after the ReLU.

    Args:
        widths: channels of the four convolutions, each divisible by 8.
        channels: channels of the images.

    Shapes:
        (n, channels, size, size) → (n, widths[-1])

    Raises:
        ValueError: a width is not divisible by 8 (raised by `torch.nn.GroupNorm`).

    Example:
        >>> import torch
        >>> digits_cnn(WIDTHS["mnist_cnn"], channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 128])
    """
    layers: list[nn.Module] = []
    before = channels
    for index, width in enumerate(widths):
        stride = 2 if index == 1 else 1
        layers += [nn.Conv2d(before, width, 3, stride, padding=1), nn.ReLU(inplace=True), nn.GroupNorm(GROUPS, width)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class FeaturizerSpec:
    """What decides the shapes of a featurizer.

    Attributes:
        backbone: a timm name, with or without the tag of its weights, or a name in `digits_cnn.WIDTHS` or
            `text.TEXT_BACKBONES`.
        channels: of the images; text has none.
        image_size: height and width of the images in pixels; text has none.
        embeds: whether features are what timm's own head makes of them, at unit length: CLIP's image embedding.
    """

    backbone: str
    channels: int
    image_size: int
    embeds: bool = False

    @property
    def is_timm(self) -> bool:
        """Whether timm builds it."""
        return self.backbone not in WIDTHS and not self.is_text and not self.is_own

    @property
    def is_own(self) -> bool:
        """Whether a plug-in builds it."""
        return self.backbone in list(OWN_BACKBONES)

    @property
    def is_text(self) -> bool:
        """Whether it reads text."""
        return self.backbone in TEXT_BACKBONES


def pretrained_cfg(backbone: str) -> PretrainedCfg:
    """Return timm's description of a backbone's weights; a neutral one (ImageNet's mean and std) if timm has none."""
    return timm.get_pretrained_cfg(backbone) or PretrainedCfg()


def input_size(backbone: str) -> int | None:
    """Return the height and width of the images that a backbone was made for, pixels; None if it reads text.

    Example:
        >>> input_size("resnet50"), input_size("digits_cnn"), input_size("distilbert-mini")
        (224, 28, None)
    """
    if backbone in TEXT_BACKBONES:
        return None
    if backbone in list(OWN_BACKBONES):
        return 224
    return 28 if backbone in WIDTHS else (pretrained_cfg(backbone).input_size or (3, 224, 224))[-1]


def build_featurizer(
    spec: FeaturizerSpec, *, pretrained: bool = False, state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a featurizer; images (n, channels, size, size), or tokens (n, length) → features (n, d).

    Args:
        spec: which one.
        pretrained: load the weights that its name means: from a hub, or from `state`.
        state: a complete state dict of the timm model, head included, that stands in for the hub's.

    Raises:
        ModelError: the backbone cannot be built for images of that size, or needs a library that is not installed.
    """
    if not spec.is_timm:
        return _build_other(spec, pretrained)
    options: dict[str, Any] = {}
    if pretrained_cfg(spec.backbone).fixed_input_size:  # transformers and their kin: position tables have a size
        options["img_size"] = spec.image_size
    if state is not None:
        options["pretrained_cfg_overlay"] = {"state_dict": dict(state)}
    if not spec.embeds:
        options["num_classes"] = 0
    try:
        featurizer = timm.create_model(spec.backbone, pretrained=pretrained, in_chans=spec.channels, **options)
    except (AssertionError, ValueError) as error:
        raise wrong_size_error(spec, error) from error
    _unscale_stem_(featurizer, spec.channels if pretrained else 3)
    if spec.embeds:
        featurizer.register_forward_hook(_to_unit_length)  # a hook: tensors keep timm's names
    return featurizer


def _build_other(spec: FeaturizerSpec, pretrained: bool) -> nn.Module:
    if spec.is_text:
        return build_text_featurizer(spec.backbone, pretrained=pretrained)
    if spec.is_own:
        return OWN_BACKBONES[spec.backbone](spec.channels, spec.image_size)
    return digits_cnn(WIDTHS[spec.backbone], channels=spec.channels)


@torch.no_grad()
def _unscale_stem_(featurizer: nn.Module, channels: int) -> None:
    """Give input channel i the pretrained weights of RGB channel i mod 3, as DomainBed does.

    timm repeats them likewise and multiplies all by 3 / channels, which changes the features of an image whose further
    channels are zero.
    """
    if channels in (1, 3):
        return
    names = cast(Any, featurizer).pretrained_cfg["first_conv"]
    for name in [names] if isinstance(names, str) else names:
        weight = featurizer.get_submodule(name).get_parameter("weight")
        weight.mul_(channels / 3)


def _to_unit_length(module: nn.Module, inputs: tuple[Tensor, ...], embedding: Tensor) -> Tensor:
    return normalize(embedding, dim=-1)


def wrong_size_error(spec: FeaturizerSpec, reason: Exception) -> ModelError:
    """Return the error for a backbone that cannot take such images."""
    own = input_size(spec.backbone)
    shape = f"{spec.channels} × {spec.image_size} × {spec.image_size}"
    said = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    return ModelError(
        f"backbone '{spec.backbone}' cannot take images of {shape} ({said}). "
        f"Try --image-size {own}, or another backbone."
    )
