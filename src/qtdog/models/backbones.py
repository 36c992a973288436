"""Networks by name: any timm backbone, a small network for digits or one for text, with a linear head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qtdog.core.errors import ModelError, extra, nearest, unknown
from qtdog.core.random import derive
from qtdog.core.registry import Value
from qtdog.models.feature_layers import make_feature_layer
from qtdog.models.hub import reason_of, short_try
from qtdog.models.network import (
    OWN_BACKBONES,
    WIDTHS,
    FeaturizerSpec,
    Network,
    build_featurizer,
    pretrained_cfg,
    wrong_size_error,
)
from qtdog.models.text_backbones import TEXT_BACKBONES, TextFeaturizer
from qtdog.models.weights import load_weights_, read_weight_file

PROMPT = "a photo of a {}."
# timm's name of an image tower → open_clip's names of model and weights
TEXT_TOWERS = {
    "vit_base_patch16_clip_quickgelu_224.openai": ("ViT-B-16-quickgelu", "openai"),
    "vit_base_patch16_clip_224.openai": ("ViT-B-16-quickgelu", "openai"),
    "vit_base_patch16_clip_224.laion2b": ("ViT-B-16", "laion2b_s34b_b88k"),
}


def check_has_text_tower(backbone: str) -> None:
    """Refuse a backbone whose embeddings no text shares.

    Raises:
        ModelError: there is no text tower for it.
    """
    if backbone not in TEXT_TOWERS:
        text = unknown("backbone with a text tower", backbone, TEXT_TOWERS)
        raise ModelError(f"model.head=text takes the classes' names through CLIP: {text}")


@torch.no_grad()
def zero_shot_classifier(backbone: str, class_names: Sequence[str]) -> Tensor:
    """Return the weights of CLIP's zero-shot classifier, shape (n_classes, d).

    Formula: W_c = exp(τ) · t_c / ‖t_c‖, with t_c the embedding of "a photo of a CLASS." and exp(τ) CLIP's learned scale
    of the logits, so that W x / ‖x‖ are CLIP's logits for an image embedding x. Source: Radford et al., *Learning
    Transferable Visual Models From Natural Language Supervision*, ICML 2021, section 3.1; CLIPood (Shu et al., ICML
    2023) begins its fine-tuning there.

    Args:
        backbone: a name in `TEXT_TOWERS`.
        class_names: names of the classes; an underscore is read as a space.

    Raises:
        ModelError: open_clip is not installed, there is no text tower, or its weights cannot be had.
    """
    check_has_text_tower(backbone)
    library = _open_clip()
    model_name, weights = TEXT_TOWERS[backbone]
    with short_try() as is_there:
        try:
            model: Any = library.create_model(model_name, pretrained=weights).eval()
        except Exception as error:  # the hub's clients raise errors of many libraries
            reason = reason_of(error, is_there)
            text = f"the text tower of '{backbone}' (open_clip: {model_name}, {weights}) could not be had: {reason}"
            raise ModelError(f"{text}. Check the connection and try again, or use --set model.head=linear.") from error
    prompts = [PROMPT.format(name.replace("_", " ")) for name in class_names]
    embeddings = model.encode_text(library.get_tokenizer(model_name)(prompts))
    return model.logit_scale.exp() * normalize(embeddings.float(), dim=-1)


def _open_clip() -> ModuleType:
    with extra("clip", "model.head=text needs open_clip"):
        import open_clip
    return open_clip


@dataclass(frozen=True)
class KnownBackbone:
    """A backbone that the project knows by name and tests.

    Attributes:
        name: as `--backbone` takes it, with the tag of its weights.
        about: what it is, and who uses it.
        extra: of pip, that brings what it needs; "" for none.

    Example:
        >>> KNOWN_BACKBONES["resnet50.tv_in1k"].extra
        ''
    """

    name: str
    about: str
    extra: str = ""


_ALL = (
    KnownBackbone("resnet50.tv_in1k", "the published protocol's; torchvision's first weights (V1)"),
    KnownBackbone("resnet18.tv_in1k", "the small one of the field; torchvision's first weights (V1)"),
    KnownBackbone("resnext50_32x4d.fb_swsl_ig1b_ft_in1k", "EoA's larger pretraining; weights for non-commercial use"),
    KnownBackbone("deit_small_patch16_224.fb_in1k", "a transformer without a teacher's token"),
    KnownBackbone("vit_base_patch16_clip_quickgelu_224.openai", "CLIP's image tower exactly; takes model.head=text"),
    KnownBackbone("vit_base_patch16_clip_224.openai", "CLIP's image tower with an exact GELU; takes model.head=text"),
    KnownBackbone("regnety_160.swag_lc_in1k", "MIRO's largest; SWAG weights for non-commercial use"),
    KnownBackbone("mobilenetv3_large_100.ra_in1k", "for phones, with squeeze-and-excitation"),
    KnownBackbone("tf_efficientnet_lite0", "for microcontrollers and phones; no squeeze-and-excitation"),
    KnownBackbone("distilbert-base-uncased", "text; as WILDS trains on Amazon reviews", extra="text"),
    KnownBackbone("distilbert-mini", "text; two narrow layers, words by hash, random weights only", extra="text"),
    KnownBackbone("mnist_cnn", "digits; DomainBed's network, random weights only"),
    KnownBackbone("digits_cnn", "digits; the same at a quarter of the width"),
)
KNOWN_BACKBONES = {backbone.name: backbone for backbone in _ALL}


def backbone_names() -> list[str]:
    """Return the names of all backbones, sorted: timm's, and those for digits and for text.

    Example:
        >>> {"resnet50", "digits_cnn"} <= set(backbone_names())
        True
    """
    return list(_names())


@cache
def _names() -> tuple[str, ...]:
    return tuple(sorted([*timm.list_models(), *WIDTHS, *TEXT_BACKBONES]))


def create_network(
    backbone: str,
    *,
    n_classes: int,
    channels: int,
    image_size: int,
    weights: str,
    freeze_bn: bool,
    seed: int,
    feature_layer: str = "none",
    feature_params: Mapping[str, Value] | None = None,
    head: str = "linear",
    class_names: Sequence[str] | None = None,
    n_features: int | None = None,
    read_weights: Callable[[Path], Mapping[str, Tensor]] = read_weight_file,
) -> Network:
    """Return a featurizer with a linear head, in training mode.

    Args:
        backbone: a name in `backbone_names()`; a timm name may carry the tag of its weights (`resnet50.tv_in1k`).
        n_classes: outputs of the head.
        channels: of the images; without meaning for text.
        image_size: height and width of the images, pixels; without meaning for text.
        weights: "none", "imagenet" or a file; see `load_weights_`.
        freeze_bn: leave the statistics of batch norm as they are loaded.
        seed: decides the random start of featurizer, head and feature layer; the global random state is left alone.
        feature_layer: a name in `feature_layers.FEATURE_LAYERS`.
        feature_params: hyper-parameters of the feature layer.
        head: "linear" starts at random on the backbone's features; "text" stands on CLIP's image embedding, of unit
            length, and starts at CLIP's text embeddings of `class_names`.
        class_names: in the order of the outputs; None leaves a "text" head random, for weights that come later.
        n_features: width of the features, if it is known; None to measure it with one image of zeros.
        read_weights: reads the state dict in a weights file.

    Raises:
        ConfigError: the feature layer or one of its hyper-parameters is unknown, or out of range.
        ModelError: the backbone is unknown or cannot take such images, its weights cannot be had or do not fit, or it
            has no place for the feature layer; or a head for text without pretrained weights, or on a backbone without
            a text tower.

    Example:
        >>> network = create_network(
        ...     "digits_cnn", n_classes=10, channels=1, image_size=28, weights="none", freeze_bn=True, seed=0
        ... )
        >>> network(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    check_backbone(backbone)
    layer = make_feature_layer(feature_layer, feature_params or {})
    spec = FeaturizerSpec(backbone, channels + layer.extra_channels, image_size, embeds=head == "text")
    _check_head(spec, weights, class_names)
    with torch.random.fork_rng(devices=[]):
        # the CPU generator alone: torch.manual_seed would also reseed accelerators, which fork_rng does not restore
        torch.default_generator.manual_seed(derive(seed, "init", "featurizer"))
        featurizer = build_featurizer(spec)
        pretraining = load_weights_(featurizer, spec, weights, read=read_weights)
        torch.default_generator.manual_seed(derive(seed, "init", "classifier"))
        classifier = nn.Linear(n_features or measure_width(featurizer, spec), n_classes)
        if spec.embeds and class_names is not None:
            pretraining += _start_at_text_(classifier, backbone, class_names)
        network = Network(featurizer, classifier, freeze_bn=freeze_bn, pretraining=pretraining)
        torch.default_generator.manual_seed(derive(seed, "init", "feature layer"))
        layer.install_(network, (channels, image_size, image_size))
    return network


def known_name(backbone: str) -> str:
    """Return the name, without its tag of weights if the installed timm knows the architecture but not the tag.

    For a file that holds all weights itself: tags come and go, the architecture is what the file needs.

    Example:
        >>> known_name("resnet50.of_another_year"), known_name("resnet50.a1_in1k"), known_name("digits_cnn")
        ('resnet50', 'resnet50.a1_in1k', 'digits_cnn')
    """
    base, _, tag = backbone.partition(".")
    plugged = backbone in list(OWN_BACKBONES)
    known = plugged or not tag or base not in _names() or backbone in timm.list_models(base, include_tags=True)
    return backbone if known else base


def preprocessing(backbone: str, *, channels: int | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation, per channel, that normalize images in [0, 1] for a backbone.

    Args:
        backbone: a name in `backbone_names()`.
        channels: of the images; default 3, or 1 for the networks for digits and text, which change nothing. If it is
            not 3, timm's three values are averaged.

    Raises:
        ModelError: the backbone is unknown.

    Example:
        >>> preprocessing("tf_efficientnet_lite0")
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> preprocessing("digits_cnn")
        ((0.0,), (1.0,))
    """
    check_backbone(backbone)
    if backbone in WIDTHS or backbone in TEXT_BACKBONES or backbone in list(OWN_BACKBONES):
        n_channels = channels or 1
        return (0.0,) * n_channels, (1.0,) * n_channels
    cfg = pretrained_cfg(backbone)
    return _per_channel(cfg.mean, channels or 3), _per_channel(cfg.std, channels or 3)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    values = tuple(values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def check_backbone(backbone: str) -> None:
    """Refuse a backbone that is not known (ModelError with the nearest name)."""
    if backbone in list(OWN_BACKBONES):
        return
    base, _, tag = backbone.partition(".")
    if base not in _names():
        close = nearest(base, backbone_names())
        hint = f"; did you mean '{close}'?" if close else "."
        raise ModelError(
            f"unknown backbone '{backbone}'{hint} Known: every model of timm {timm.__version__}, "
            f"{', '.join([*WIDTHS, *TEXT_BACKBONES])} (qtdog list backbones). "
            "If a plug-in makes it, name its file: --plugin FILE.py."
        )
    if tag and backbone not in (tagged := timm.list_models(base, include_tags=True)):
        raise ModelError(unknown("backbone", backbone, tagged))


def _check_head(spec: FeaturizerSpec, weights: str, class_names: Sequence[str] | None) -> None:
    if not spec.embeds:
        return
    check_has_text_tower(spec.backbone)
    if weights == "none" and class_names is not None:
        raise ModelError("model.head=text fits CLIP's image embedding only: --weights none has nothing that it fits")


@torch.no_grad()
def _start_at_text_(classifier: nn.Linear, backbone: str, class_names: Sequence[str]) -> str:
    weight = zero_shot_classifier(backbone, class_names)
    if weight.shape != classifier.weight.shape:
        raise ModelError(f"the text tower of '{backbone}' gives {tuple(weight.shape)}, not {classifier.weight.shape}")
    classifier.weight.copy_(weight)
    classifier.bias.zero_()
    return "; classifier from the class names"


def measure_width(featurizer: nn.Module, spec: FeaturizerSpec) -> int:
    """Return how many features come out, from one image of zeros: timm's attributes are wrong for some backbones.

    Raises:
        ModelError: the backbone cannot take such images, or gives no vector of features.
    """
    if isinstance(featurizer, TextFeaturizer):
        return featurizer.n_features
    featurizer.eval()
    device = next(featurizer.parameters()).device
    with torch.no_grad():
        try:
            features = featurizer(torch.zeros(1, spec.channels, spec.image_size, spec.image_size, device=device))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise wrong_size_error(spec, error) from error
    if features.ndim != 2:
        shape = tuple(features.shape)
        raise ModelError(f"backbone '{spec.backbone}' gives features of shape {shape}, not (n, d): choose another.")
    return features.shape[1]
