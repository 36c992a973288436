"""Load a packed model file: from a path to a network that answers as it did in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from qtdog.conversion.save import fill
from qtdog.core.errors import ConfigError, FormatError
from qtdog.data.augment import normalise
from qtdog.models.backbones import at_most, create_network
from qtdog.models.feature_layers import make_feature_layer
from qtdog.models.network import Network, place_
from qtdog.models.text import TEXT_BACKBONES, check_words
from qtdog.packing.ensemble_file import is_ensemble
from qtdog.packing.packed_file import PackedModel, load_packed


class _Untrusted(BaseModel):
    """What a file says of itself is checked like any input."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Preprocessing(_Untrusted):
    """How an image becomes the network's input: decode, resize (bilinear, antialiased, no crop), scale, normalise.

    With `max_tokens` the model reads text, cut to so many tokens, and image size, mean and std have no meaning.
    `vocabulary` are then the word pieces in the order of their numbers; it is empty if a hash numbers the words.
    """

    image_size: int = Field(ge=8, le=1024)
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_tokens: int = Field(default=0, ge=0, le=512)
    vocabulary: tuple[str, ...] = Field(default=(), repr=False)

    @field_validator("vocabulary")
    @classmethod
    def _whole(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if words:
            check_words(words)
        return words


# What the members of one ensemble have in common, by attribute of `ModelInfo`.
STRUCTURE = ("backbone", "head", "feature_layer", "feature_params", "classes", "preprocessing")


class ModelInfo(_Untrusted):
    """What a shipped file says of itself.

    Attributes:
        backbone: its name, from which the network is rebuilt.
        classes: names, in the order of the logits.
        preprocessing: see there.
        source_domains: trained on these.
        target_domain: held out in training, or None.
        accuracy: measured at the selected checkpoint: `source` (held-out part of the sources) and `test`.
        pretraining: where the initial weights came from.
        bits: per quantized weight, or None for a float model.
        step: updates behind the shipped weights.
        config_hash: of the run's configuration.
        feature_layer: what the network has besides its backbone, a name of `models.feature_layers.FEATURE_LAYERS`.
        feature_params: its hyper-parameters.
        head: what the classifier stands on, as `model.head` says it.
    """

    backbone: str
    classes: tuple[str, ...] = Field(min_length=1, max_length=100_000)
    preprocessing: Preprocessing
    source_domains: tuple[str, ...]
    target_domain: str | None
    accuracy: dict[str, float | None]
    pretraining: str
    bits: int | None
    step: int
    config_hash: str
    feature_layer: str = "none"
    feature_params: dict[str, bool | int | float | str] = {}
    head: Literal["linear", "text"] = "linear"


class LoadedModel(nn.Module):
    """A network with what is needed to use it.

    Attributes:
        network: plain, dequantized, in evaluation mode.
        info: what the file says of itself.
    """

    def __init__(self, network: Network, info: ModelInfo) -> None:
        super().__init__()
        self.network = network
        self.info = info

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, n_classes) of normalised images (n, C, H, W)."""
        return self.network(images)

    def prepare(self, images: Tensor) -> Tensor:
        """Return the network's input (n, C, H, W) for uint8 images (n, H, W, C) of the right size; tokens as is."""
        how = self.info.preprocessing
        return images if how.max_tokens else normalise(images, how.mean, how.std)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, n_classes) of uint8 images (n, H, W, C)."""
        device = next(self.network.parameters()).device
        return self(self.prepare(images).to(device)).softmax(1)


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> LoadedModel:
    """Return the model in a shipped file, in evaluation mode; its logits equal the training-time model's exactly.

    Args:
        path: a `model.safetensors` that `qtdog train` wrote.
        device: where to put it.

    Raises:
        FormatError: the file is missing, truncated, hostile, of another version, or holds an ensemble.
        ModelError: its backbone is not known here, or does not fit.
    """
    path = Path(path)
    if is_ensemble(path):
        raise FormatError(f"{path} holds an ensemble, not one model: read it with qtdog.load")
    packed = load_packed(path)
    info = read_info(path, packed.metadata)
    network = fill(packed, network_for(path, packed, info), path)
    return LoadedModel(place_(network, torch.device(device)), info).eval()


def network_for(path: Path, packed: PackedModel, info: ModelInfo) -> Network:
    """Return what `empty_network` does for a file; one that names a far larger network than it holds takes no memory.

    Args:
        path: the file, for errors.
        packed: its content.
        info: what it says of itself.

    Raises:
        ModelError: as in `empty_network`, or the network is far larger than the content.
    """
    tensors = {id(value): value.codes for value in packed.quantized.values()}
    tensors |= {id(value): value for value in packed.rest.values()}
    with at_most(sum(value.numel() for value in tensors.values()), str(path)):
        return empty_network(info)


def empty_network(info: ModelInfo) -> Network:
    """Return a network of the kind that a file describes, on the CPU, its weights without meaning.

    Raises:
        ModelError: the backbone is not known here, or cannot take such images.
        ConfigError: so with the feature layer; `read_info` refuses a file that says such.
    """
    how = info.preprocessing
    return create_network(
        info.backbone,
        n_classes=len(info.classes),
        channels=how.channels,
        image_size=how.image_size,
        weights="none",
        freeze_bn=True,
        seed=0,
        feature_layer=info.feature_layer,
        feature_params=info.feature_params,
        head=info.head,
    )


def read_info(path: Path, metadata: dict[str, Any]) -> ModelInfo:
    """Return the validated description in a file's metadata.

    Raises:
        FormatError: a field is missing or out of range, the feature layer is not known here, or the vocabulary does not
            fit the backbone.
    """
    try:
        info = ModelInfo.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{path} does not describe a qtdog model: {where}: {first['msg']}") from error
    if not len(info.preprocessing.mean) == len(info.preprocessing.std) == info.preprocessing.channels:
        raise FormatError(f"{path}: mean and std must have {info.preprocessing.channels} entries, one per channel")
    _check_text(path, info)
    try:
        make_feature_layer(info.feature_layer, info.feature_params)
    except ConfigError as error:
        raise FormatError(f"{path} has a feature layer that is not known here: {error}") from error
    return info


def _check_text(path: Path, info: ModelInfo) -> None:
    text, how = TEXT_BACKBONES.get(info.backbone), info.preprocessing
    if bool(how.max_tokens) != (text is not None):
        raise FormatError(f"{path}: max_tokens is {how.max_tokens}, and that does not fit {info.backbone}")
    n_words = 0 if text is None or text.hub_name is None else text.n_words
    if len(how.vocabulary) > n_words:
        raise FormatError(f"{path}: {info.backbone} takes {n_words} words, the vocabulary has {len(how.vocabulary)}")
