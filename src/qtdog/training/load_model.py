"""Load a packed model file: from a path to a network that answers as it did in training."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from qtdog.conversion.load import check_fits, plain_state_dict
from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, FormatError, ModelError, QtdogError, RunError
from qtdog.core.progress import Progress
from qtdog.core.quantized import QuantizedTensor
from qtdog.core.safe_text import read_json
from qtdog.data.augment import normalize
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_readable, recorded_source
from qtdog.models.backbones import create_network, known_name
from qtdog.models.feature_layers import make_feature_layer
from qtdog.models.network import Network, to_device_
from qtdog.models.text_backbones import TEXT_BACKBONES, check_words
from qtdog.models.weights import read_weight_file
from qtdog.packing.ensemble_file import PackedEnsemble, read_packed
from qtdog.packing.layout import KEY, read_header
from qtdog.packing.packed_file import PackedModel, load_packed
from qtdog.quantizers.activations import ActivationGrid, fix_inputs_
from qtdog.runs.folder import RunFolder
from qtdog.training.plugins import load_entry_points, origin_of


class _Untrusted(BaseModel):
    """What a file says of itself is checked like any input."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Preprocessing(_Untrusted):
    """How an image becomes the network's input: decode, resize (bilinear, antialiased, no crop), scale, normalize.

    With `max_tokens` the model reads text, cut to so many tokens, and image size, mean and std have no meaning.
    `vocabulary` are then the word pieces in the order of their numbers; it is empty if a hash numbers the words.
    """

    image_size: int = Field(ge=8, le=1024)
    channels: Literal[1, 3]
    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    max_tokens: int = Field(default=0, ge=0, le=512)
    vocabulary: tuple[str, ...] = Field(default=(), repr=False)

    @field_validator("vocabulary")
    @classmethod
    def _whole(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if words:
            check_words(words)
        return words


class PluginNote(_Untrusted):
    """A plug-in that a run was made with: to be compared and named in messages, never a reason to run one."""

    name: str = Field(max_length=200)
    sha256: str = Field(max_length=64)


class ActivationNote(_Untrusted):
    """The grid of a layer's input: step size, bits, and whether there are negative codes."""

    bits: int = Field(ge=2, le=8)
    signed: bool
    scale: float = Field(gt=0, allow_inf_nan=False)


# What the members of one ensemble have in common, by attribute of `ModelInfo`.
STRUCTURE = ("backbone", "head", "feature_layer", "feature_params", "classes", "preprocessing")


class ModelInfo(_Untrusted):
    """The description in a model file.

    Attributes:
        backbone: its name, from which the network is rebuilt.
        classes: names, in the order of the logits.
        preprocessing: see there.
        source_domains: trained on these.
        target_domain: held out in training, or None.
        accuracy: measured at the selected checkpoint: `source` (validation split of the sources) and `test`.
        pretraining: where the initial weights came from.
        bits: per quantized weight, or None for a float model.
        step: updates behind the saved weights.
        config_hash: of the run's configuration.
        feature_layer: what the network has besides its backbone, a name of `models.feature_layers.FEATURE_LAYERS`.
        feature_params: its hyper-parameters.
        head: what the classifier stands on, as `model.head` says it.
        timm: version of timm that built the backbone; "" for one of our own, or in a file from before it was kept.
        plugins: those that the run was made with.
        temperature: of the probabilities, fitted on the sources' validation images; 1 in a file from before it was.
        accept_threshold: smallest probability of an answer that is accepted, chosen on the same images, or None.
        activations: grids of the inputs of layers, by name; {} where activations are float.
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
    timm: str = Field(default="", max_length=100)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    accept_threshold: float | None = Field(default=None, ge=0, le=1)
    plugins: tuple[PluginNote, ...] = Field(default=(), max_length=100)
    activations: dict[str, ActivationNote] = Field(default={}, max_length=100_000)


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
        """Return logits (n, n_classes) of normalized images (n, C, H, W)."""
        return self.network(images)

    def prepare(self, images: Tensor) -> Tensor:
        """Return the network's input (n, C, H, W) for uint8 images (n, H, W, C) of the right size; tokens as is."""
        preprocessing = self.info.preprocessing
        return images if preprocessing.max_tokens else normalize(images, preprocessing.mean, preprocessing.std)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, n_classes) of uint8 images (n, H, W, C): softmax(logits / T)."""
        device = next(self.network.parameters()).device
        return (self(self.prepare(images).to(device)) / self.info.temperature).softmax(1)


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> LoadedModel:
    """Return the one model in a file, in evaluation mode; its logits equal those in training exactly.

    Args:
        path: a `model.safetensors` that `qtdog train` wrote.
        device: where to put it.

    Raises:
        FormatError: the file is missing, truncated, hostile, of another version, or holds an ensemble.
        ModelError: its backbone is not known here, or does not fit.
    """
    path = Path(path)
    packed = read_packed(path)
    if isinstance(packed, PackedEnsemble):
        raise FormatError(f"{path} holds an ensemble, not one model: read it with qtdog.load")
    return build_single_model(path, packed, device=device)


def build_single_model(path: Path, packed: PackedModel, *, device: str | torch.device = "cpu") -> LoadedModel:
    """Return the one model that a file holds, in evaluation mode.

    Args:
        path: the file, for errors.
        packed: its content.
        device: where to put it.

    Raises:
        FormatError: its description is malformed.
        ModelError: its backbone is not known here, or does not fit.
    """
    info = read_info(path, packed.metadata)
    (network,) = build_networks(path, [packed], info)
    return LoadedModel(to_device_(network, torch.device(device)), info).eval()


SIZE_FACTOR = 2
"""How many times the values of a file a network may have: tied weights count twice."""
SPARE_VALUES = 2**20


def build_networks(
    path: Path, members: Sequence[PackedModel], info: ModelInfo, *, float_activations: bool = False
) -> list[Network]:
    """Return a network for each content of a file, in evaluation mode on the CPU.

    A value that several contents share, or that has several names, is one tensor in all networks. A file that names a
    far larger network than it holds is refused before memory is taken.

    Args:
        path: the file, for errors.
        members: contents with the same names and shapes.
        info: the description of the first.
        float_activations: leave activations in float, although the networks were trained with grids for them.

    Raises:
        FormatError: a grid of an activation is out of range, or of a layer that there is not.
        ModelError: the backbone is not known here, is far larger than the content, or does not fit it.
    """
    _compare_plugins(path, info)
    outline = _outline(path, members[0], info)
    for member in members:
        check_fits(member, outline, path)
    empty = empty_network(info, n_features=outline.classifier.in_features)
    shared = {id(tensor): tensor for tensor in (*empty.parameters(), *empty.buffers())}
    made: dict[tuple[int, bool], Tensor] = {}
    networks = []
    for member in members:
        network = copy.deepcopy(empty, dict(shared))  # tensors that the file does not hold are the same in all
        for name, value in (*member.quantized.items(), *member.rest.items()):
            _set_tensor_(network, name, value, made)
        if not float_activations:
            is_described = member.metadata and member is not members[0]
            _round_inputs_(network, read_info(path, member.metadata) if is_described else info, path)
        networks.append(network.eval())
    return networks


def _round_inputs_(network: Network, info: ModelInfo, path: Path) -> None:
    """Let layers round their inputs to the grids that a file describes, each member to its own."""
    modules = dict(network.named_modules())
    for name, note in info.activations.items():
        layer = modules.get(name)
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            raise FormatError(f"{path}: it has a grid for the input of '{name[:80]}', which is no layer of the network")
        fix_inputs_(layer, ActivationGrid(note.bits, note.signed, note.scale))


def _compare_plugins(path: Path, info: ModelInfo) -> None:
    """Warn if the code that rebuilds the network is not the text that the file was made with."""
    load_entry_points()
    made_with = {one.sha256 for one in info.plugins}
    found = {f"{axis} '{name}'": origin_of(axis, name) for axis, name in (
        ("backbone", info.backbone), ("feature-layer", info.feature_layer),
    )}  # fmt: skip
    others = {what: here for what, here in found.items() if here is not None and here.sha256 not in made_with}
    if others:
        here = ", ".join(dict.fromkeys(f"{one.name} ({one.sha256[:12]})" for one in others.values()))
        text = f"{path} was made with another version of the plug-in of {' and '.join(others)}"
        before = _listed(info.plugins) or "none"
        warnings.warn(f"{text}: with {before}, and here is {here}. It may answer otherwise", stacklevel=4)


def _listed(plugins: Sequence[PluginNote]) -> str:
    return ", ".join(f"{one.name} ({one.sha256[:12]})" for one in plugins)


def _plugins_in_words(plugins: Sequence[PluginNote]) -> str:
    if not plugins:
        return ""
    advice = "if you trust such a file, name it: --plugin FILE.py (in Python qtdog.load_plugins)"
    return f". It was made with {_listed(plugins)}; {advice}"


def _outline(path: Path, packed: PackedModel, info: ModelInfo) -> Network:
    """Return the network that a file names without memory for its values, after checking its size and width."""
    stored = {name: value.codes for name, value in packed.quantized.items()} | packed.rest
    shape = stored["classifier.weight"].shape if "classifier.weight" in stored else ()
    if len(shape) != 2 or 0 in shape:
        raise ModelError(f"{path} does not fit: it has no 'classifier.weight' of shape (classes, features)")
    try:
        with torch.device("meta"):
            outline = empty_network(info, n_features=shape[1])
    except ModelError as error:
        if info.plugins:
            raise ModelError(f"{path}: {error}{_plugins_in_words(info.plugins)}") from error
        if info.timm in ("", timm.__version__):
            raise
        text = f"the file was written with timm {info.timm}, here is {timm.__version__}: install that one"
        raise ModelError(f"{path}: {error} ({text})") from error
    tensors = {id(value): value.codes for value in packed.quantized.values()}
    tensors |= {id(value): value for value in packed.rest.values()}
    n_values = sum(value.numel() for value in tensors.values())
    limit = SIZE_FACTOR * n_values + SPARE_VALUES
    n_found = sum(value.numel() for value in (*outline.parameters(), *outline.buffers()))
    if n_found > limit:
        text = f"{path} does not fit: it holds {n_values:,} values, the network that it names has {n_found:,}"
        raise ModelError(f"{text}. The file is damaged, or not what it says")
    _check_width(path, outline, info)
    return outline


def _check_width(path: Path, outline: Network, info: ModelInfo) -> None:
    """Compare the width of the stored classifier with that of the features, without computing them."""
    preprocessing = info.preprocessing
    inputs = torch.zeros(1, preprocessing.channels, preprocessing.image_size, preprocessing.image_size, device="meta")
    if preprocessing.max_tokens:
        inputs = torch.zeros(1, preprocessing.max_tokens, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            outline.eval()(inputs)
    except NotImplementedError:  # an operation that needs values: the shapes of all tensors still have to fit
        return
    except (RuntimeError, AssertionError, ValueError) as error:
        if "cannot be called on meta tensors" in str(error):  # likewise: the attention mask of a text
            return
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} does not fit the network that it names ({reason}). The file is damaged") from error


def _set_tensor_(
    network: Network, name: str, value: QuantizedTensor | Tensor, made: dict[tuple[int, bool], Tensor]
) -> None:
    """Put a packed value under its name into a network, the same tensor for the same value."""
    owner, _, leaf = name.rpartition(".")
    module = network.get_submodule(owner)
    old = getattr(module, leaf)
    key = id(value), isinstance(old, nn.Parameter)
    if key not in made:
        tensor = value.dequantize() if isinstance(value, QuantizedTensor) else value.clone()
        tensor = tensor.to(old.dtype)
        made[key] = nn.Parameter(tensor, requires_grad=old.requires_grad) if key[1] else tensor
    setattr(module, leaf, made[key])


def empty_network(info: ModelInfo, *, n_features: int | None = None) -> Network:
    """Return a network of the kind that a file describes, on the CPU, its weights without meaning.

    Args:
        info: the description.
        n_features: width of its features, if it is known.

    Raises:
        ModelError: the backbone is not known here, or cannot take such images.
        ConfigError: so with the feature layer; `read_info` refuses a file that says such.
    """
    preprocessing = info.preprocessing
    return create_network(
        known_name(info.backbone),
        n_classes=len(info.classes),
        channels=preprocessing.channels,
        image_size=preprocessing.image_size,
        weights="none",
        freeze_bn=True,
        seed=0,
        feature_layer=info.feature_layer,
        feature_params=info.feature_params,
        head=info.head,
        n_features=n_features,
    )


def read_any_weights(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a weights file: one of ours (dequantized), or what `read_weight_file` reads.

    Raises:
        ModelError: the file is missing, unreadable, holds code, or holds no state dict.
        FormatError: it is one of ours, and damaged.
    """
    if path.suffix == ".safetensors" and path.is_file() and KEY in read_header(path).metadata:
        return plain_state_dict(load_packed(path))
    return read_weight_file(path)


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
    load_entry_points()
    try:
        layer = make_feature_layer(info.feature_layer, info.feature_params)
    except ConfigError as error:
        needed = _plugins_in_words(info.plugins)
        raise FormatError(f"{path} has a feature layer that is not known here: {error}{needed}") from error
    if info.feature_layer != "none" and not layer.SAVED:
        raise FormatError(f"{path}: the feature layer '{info.feature_layer}' is for training only, and in no file")
    return info


def _check_text(path: Path, info: ModelInfo) -> None:
    text, preprocessing = TEXT_BACKBONES.get(info.backbone), info.preprocessing
    if bool(preprocessing.max_tokens) != (text is not None):
        raise FormatError(f"{path}: max_tokens is {preprocessing.max_tokens}, and that does not fit {info.backbone}")
    n_words = 0 if text is None or text.hub_name is None else text.n_words
    if len(preprocessing.vocabulary) > n_words:
        raise FormatError(
            f"{path}: {info.backbone} takes {n_words} words, the vocabulary has {len(preprocessing.vocabulary)}"
        )


def training_configs(model_file: Path) -> list[Config]:
    """Return the configurations of the runs that a model file was made by, as far as their folders are there.

    Of one model that is the run in whose folder the file lies; of an ensemble the runs of its members.
    """
    folders = [model_file.parent]
    with contextlib.suppress(RunError, ValueError, KeyError, TypeError):
        members = read_json(model_file.parent / "result.json")["members"]
        folders += [model_file.parent / str(member["folder"]) for member in members]
    configs = []
    for folder in folders:
        # a config.yaml that is not of a run has nothing to say here
        with contextlib.suppress(QtdogError, OSError):
            configs.append(RunFolder(folder).read_config())
    return [config for config in configs if config is not None]


def open_training_data(
    model_files: Sequence[Path], source: str | None = None, *, min_domains: int = 1, progress: Progress = None
) -> DomainDataset:
    """Return a data set opened as the runs behind some model files opened theirs.

    If one of the runs left out images that cannot be read (`data.skip_unreadable`), they are left out here too.

    Args:
        model_files: finished models or ensembles.
        source: name, folder or manifest; None for the data set of the first run.
        min_domains: refuse fewer domains.
        progress: of reading images.

    Raises:
        ConfigError: no `source` is given, and no run lies beside the files.
        DataError: the data set cannot be used.
    """
    configs = [config for file in model_files for config in training_configs(file)]
    if source is None and not configs:
        raise ConfigError(f"no run lies beside {model_files[0]}, so its data set is not known: give it with --data")
    how: dict[str, Any] = {"min_domains": min_domains, "progress": progress}
    how["skip_unreadable"] = any(config.data.skip_unreadable for config in configs)
    if source is not None:
        return open_readable(source, **how)
    recorded = configs[0].data.source
    with recorded_source(recorded):
        return open_readable(recorded, **how)
