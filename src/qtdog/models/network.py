"""The one shape that every model has, a featurizer and a linear head; from a backbone's name to its featurizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from qtdog.core.errors import ModelError
from qtdog.core.registry import Registry
from qtdog.models.text_backbones import TEXT_BACKBONES, build_text_featurizer


def freeze_batch_norm_(module: nn.Module) -> None:
    """Put every batch-norm layer inside `module` into evaluation mode, in place.

    In that mode a layer computes y = γ · (x - μ) / √(σ² + ε) + β with the stored statistics μ and σ² and does not
    update them; γ and β stay trainable. Small batches from several domains would spoil the pretrained statistics
    (protocol: DomainBed's `ResNet` featurizer).

    Example:
        >>> layer = nn.BatchNorm2d(3)
        >>> freeze_batch_norm_(layer)
        >>> layer.training, layer.weight.requires_grad
        (False, True)
    """
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.eval()


class Network(nn.Module):
    """Featurizer followed by a linear classifier.

    Attributes:
        featurizer: maps images (n, channels, size, size) to features (n, d).
        classifier: maps features (n, d) to logits (n, n_classes).
        context: maps images to what the featurizer takes, with the sizes of the domains that they come from; None for
            the images themselves.
        freeze_bn: whether `train()` leaves the statistics of the featurizer's batch norm alone.
        pretraining: where the featurizer's weights come from, in words; "none" for a random start.

    Example:
        >>> import torch
        >>> network = Network(nn.Flatten(), nn.Linear(12, 5), freeze_bn=True)
        >>> network(torch.zeros(2, 3, 2, 2)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, featurizer: nn.Module, classifier: nn.Linear, *, freeze_bn: bool, pretraining: str = "none"
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.classifier = classifier
        self.context: nn.Module | None = None
        self.freeze_bn = freeze_bn
        self.pretraining = pretraining
        self.train()

    def features(self, images: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Return the features (n, d) of images (n, channels, size, size).

        Args:
            images: domain after domain, if there is a context.
            sizes: images of each domain, for the context; default: all are of one domain.
        """
        return self.featurizer(images if self.context is None else self.context(images, sizes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, n_classes) of images (n, channels, size, size)."""
        return self.classifier(self.features(images))

    def train(self, mode: bool = True) -> Self:
        """Set training mode (or evaluation mode) everywhere but in frozen batch-norm layers of the featurizer."""
        super().train(mode)
        if self.freeze_bn:
            freeze_batch_norm_(self.featurizer)
        return self


def to_device_(network: Network, device: torch.device) -> Network:
    """Move a network to `device` in channels-last memory, in place, and return it.

    Training and loading both go through here: with another memory format a convolution takes other kernels, and the
    last bits of the logits differ.

    Example:
        >>> from torch import nn
        >>> network = Network(nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten()), nn.Linear(8, 2), freeze_bn=True)
        >>> weight = to_device_(network, torch.device("cpu")).featurizer[0].weight
        >>> weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    network.to(device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return network


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
