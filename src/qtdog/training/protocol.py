"""The protocol of a run: which domains are sources, which is unseen, which images serve what, and how they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qtdog.core.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from qtdog.core.config_io import Tree, load_preset
from qtdog.core.errors import ConfigError, DataError, ModelError, unknown
from qtdog.core.files import sha256_file
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset, composed
from qtdog.data.decoded_cache import InputCache, content_sha256, open_cache
from qtdog.data.splits import DomainSplits, make_splits, training_obstacles, with_wrong_labels
from qtdog.data.text import TextDomains, open_tokens
from qtdog.models.backbones import preprocessing
from qtdog.models.text_backbones import TEXT_BACKBONES, make_tokenizer, vocabulary, vocabulary_id


@dataclass(frozen=True)
class DomainProtocol:
    """Roles of domains and images.

    Attributes:
        sources: names of the source domains, sorted.
        target: the unseen domain, or None.
        splits: dataset indices by domain and part.
        train_on_heldout: whether the held-out images are trained on too; selection then has no say.
    """

    sources: tuple[str, ...]
    target: str | None
    splits: DomainSplits
    train_on_heldout: bool = False

    def selection_sets(self) -> dict[str, np.ndarray]:
        """Return the held-out images of each source: all that selection may look at."""
        return {domain: self.splits[domain].heldout for domain in self.sources}

    def train_pools(self) -> dict[str, np.ndarray]:
        """Return the training images of each source."""
        splits = {domain: self.splits[domain] for domain in self.sources}
        if self.train_on_heldout:
            return {domain: np.concatenate([split.train, split.heldout]) for domain, split in splits.items()}
        return {domain: split.train for domain, split in splits.items()}


def dataset_layer(dataset: DomainDataset, *, with_preset: bool) -> Tree:
    """Return what the dataset card says about training on it: the layer below every other."""
    layer: Tree = {"data": {"augment": dataset.card.augment}}
    if dataset.card.steps:
        layer["train"] = {"steps": dataset.card.steps, "eval_every": dataset.card.eval_every}
    if with_preset and dataset.card.preset:
        preset = load_preset(dataset.card.preset)
        layer = preset | {"data": layer["data"] | preset.get("data", {})}
    return layer


def known_target(dataset: DomainDataset, target: str) -> str:
    """Return the target domain as the data set spells it, where the user's Unicode form may be another.

    Raises:
        ConfigError: the data set has no such domain; the text has the nearest one.
    """
    for name in (target, composed(target)):
        if name in dataset.domains:
            return name
    text = unknown("target domain", target, [*dataset.domains, "all", "none"])
    raise ConfigError(". ".join([text, *dataset.notes]))


def resolve(config: Config, dataset: DomainDataset, progress: Progress = None, *, content: str = "") -> Config:
    """Return the effective configuration: the content of the data filled in, names of domains checked.

    Args:
        config: as it was asked for.
        dataset: the data it names.
        progress: of hashing images.
        content: the data set's content if it is known (many configurations of one data set); "" to find it out.

    Raises:
        ConfigError: the target is not a domain of the data set, the teacher is missing or another one, or the weights
            are others.
        DataError: the data is not what the configuration was made for, or cannot be trained on.
    """
    data = config.data
    content = content or content_sha256(dataset, progress=progress)
    if data.content not in ("", content):
        text = f"the images of {data.source} changed since this configuration was made"
        hint = "Start a new run in another folder; --weights OLD/model.safetensors begins with what this one learned"
        raise DataError(f"{text} (content {data.content[:12]} → {content[:12]}). {hint}")
    if data.target != "none":
        data = data.model_copy(update={"target": known_target(dataset, data.target)})
    check_trainable(dataset, data)
    resolved = data.model_copy(update={"content": content})
    sections = {"data": resolved, "model": _with_weights(config.model), "objective": _with_teacher(config.objective)}
    return config.model_copy(update=sections)


def _with_weights(model: ModelConfig) -> ModelConfig:
    """The configuration of a model whose weights are a file names its content: another file makes another run."""
    path = Path(model.weights)
    if model.weights in ("imagenet", "package", "none") or not path.is_file():
        return model  # building the network says what is wrong with the name
    found = sha256_file(path)
    if model.weights_sha256 not in ("", found):
        raise ConfigError(f"the weights {path} are not the ones that this run began with; start a new run")
    return model.model_copy(update={"weights_sha256": found})


def _with_teacher(objective: ObjectiveConfig) -> ObjectiveConfig:
    if not objective.teacher:
        return objective
    path = Path(objective.teacher)
    if not path.is_file() and not is_backbone(objective.teacher):
        raise ConfigError(
            f"the teacher {path} is not a file, nor a backbone (qtdog list backbones, torchvision/NAME); give the "
            "model.safetensors of a run or an ensemble, or a backbone's name"
        )
    found = sha256_file(path) if path.is_file() else _backbone_sha256(objective)
    if objective.teacher_sha256 not in ("", found):
        raise ConfigError(f"the teacher {path} is not the one that this run began with; start a new run")
    return objective.model_copy(update={"teacher_sha256": found})


TORCHVISION = "torchvision/"
"""Prefix of a teacher that torchvision builds."""


def is_backbone(name: str) -> bool:
    """Return whether a name is that of a backbone that can teach: timm's, torchvision's, a plug-in's or our own.

    Example:
        >>> is_backbone("tf_efficientnet_lite2"), is_backbone("torchvision/resnet18"), is_backbone("no.safetensors")
        (True, True, False)
    """
    if name.startswith(TORCHVISION):
        return True  # building it says whether there is such a one, without importing torchvision here
    try:
        preprocessing(name)
    except ModelError:
        return False
    return True


def _backbone_sha256(objective: ObjectiveConfig) -> str:
    """A backbone is known by its name, as `model.backbone` is, and by the content of its weights if they are a file."""
    weights = Path(objective.teacher_weights)
    weights_hash = sha256_file(weights) if weights.is_file() else objective.teacher_weights
    return hashlib.sha256(f"backbone {objective.teacher} {weights_hash}".encode()).hexdigest()


def check_trainable(dataset: DomainDataset, data: DataConfig) -> None:
    """Check that sources remain and that no domain lacks a class.

    Raises:
        DataError: too few domains, or a class is missing from a domain (unless that is allowed).
    """
    if len(dataset.domains) < 2 and data.target != "none":
        raise DataError(f"{data.source} has one domain ({', '.join(dataset.domains)}): nothing is left to train on.")
    if len(dataset.classes) < 2:
        raise DataError(f"{data.source}: {training_obstacles(dataset)[0]}.")
    missing = [f"'{name}' in domain '{domain}'" for domain, name in dataset.missing_classes()]
    if missing and not data.allow_missing_classes:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        hint = "Add images, or accept it with --set data.allow_missing_classes=true"
        raise DataError(f"no image of class {listed}. {hint} (qtdog data verify {data.source} shows more).")


def make_protocol(config: Config, dataset: DomainDataset) -> DomainProtocol:
    """Return the roles that the configuration gives to domains and images."""
    data = config.data
    target = None if data.target == "none" else data.target
    splits = make_splits(dataset, frac=data.holdout_frac, trial=data.trial, test_mode=data.test_mode)
    return DomainProtocol(source_domains(config, dataset), target, splits, data.train_on_heldout)


def source_domains(config: Config, dataset: DomainDataset) -> tuple[str, ...]:
    """Return the domains that a run trains on; nothing is divided for that."""
    return tuple(dataset.sources(None if config.data.target == "none" else config.data.target))


@dataclass(frozen=True)
class RunLabels:
    """The labels of a run, class of each image (n,): what it trains on, and what it is evaluated by.

    They differ where `data.splits` makes labels of the sources wrong. The target's, and those of the in-domain
    test part, are always right.
    """

    training: npt.NDArray[np.integer]
    evaluation: npt.NDArray[np.integer]


def run_labels(config: Config, protocol: DomainProtocol, dataset: DomainDataset) -> RunLabels:
    """Return the labels of a run; the wrong ones depend on `data.trial`, not on the seed of training."""
    data, right = config.data, dataset.class_index
    if not data.label_noise:
        return RunLabels(right, right)
    how = {"n_classes": len(dataset.classes), "seed": data.trial}
    train = {f"{domain} train": protocol.splits[domain].train for domain in protocol.sources}
    heldout = {f"{domain} heldout": protocol.splits[domain].heldout for domain in protocol.sources}
    seen = train | (heldout if protocol.train_on_heldout or data.label_noise_validation else {})
    training = with_wrong_labels(right, seen, data.label_noise, **how)
    judged = heldout if data.label_noise_validation else {}
    return RunLabels(training, with_wrong_labels(right, judged, data.label_noise, **how))


MIXES_PIXELS = ("mixup",)


def check_input(config: Config, dataset: DomainDataset) -> None:
    """Refuse a configuration that wants images of texts, or texts of images.

    Raises:
        ConfigError: the backbone is for the other kind of data, or a method works on pixels and there are none.
    """
    check_reads(config.model.backbone, dataset)
    if not isinstance(dataset, TextDomains):
        return
    name = dataset.card.name
    if config.data.augment != "none":
        raise ConfigError(f"{name} is text, which data.augment={config.data.augment} cannot change: set it to none")
    for kind, member, is_bad in (
        ("objective", config.objective.name, config.objective.name in MIXES_PIXELS),
        ("feature layer", config.model.feature_layer, config.model.feature_layer != "none"),
    ):
        if is_bad:
            raise ConfigError(f"{kind} '{member}' works on images, and {name} is text: take another")


def check_reads(backbone: str, dataset: DomainDataset) -> None:
    """Refuse to show texts to a backbone for images, or images to one for text.

    Raises:
        ConfigError: naming what fits.
    """
    reads_text, name = backbone in TEXT_BACKBONES, dataset.card.name
    if reads_text and not isinstance(dataset, TextDomains):
        raise ConfigError(f"backbone '{backbone}' reads text, and {name} is of images: take another")
    if isinstance(dataset, TextDomains) and not reads_text:
        known = ", ".join(TEXT_BACKBONES)
        raise ConfigError(f"{name} is text, which backbone '{backbone}' cannot read; use one of {known}")


def open_inputs(
    dataset: DomainDataset,
    backbone: str,
    *,
    image_size: int,
    max_tokens: int,
    words: Sequence[str] = (),
    progress: Progress = None,
) -> InputCache:
    """Return the data set as a backbone takes it, decoded or tokenized now unless that was done before.

    Args:
        dataset: images or texts.
        backbone: whose vocabulary numbers the words.
        image_size: of images, pixels.
        max_tokens: of texts.
        words: the vocabulary that a model file holds; empty for the backbone's own.
        progress: of what takes long.

    Raises:
        DataError: an image cannot be read.
        ModelError: the vocabulary cannot be had.
        RunError: the cache folder cannot be written.
    """
    if not isinstance(dataset, TextDomains):
        return open_cache(dataset, image_size, progress=progress)
    words = words or vocabulary(backbone)
    tokenize = make_tokenizer(backbone, max_tokens, words)
    name = f"{backbone} {vocabulary_id(words)}" if words else backbone
    return open_tokens(dataset, tokenize, name=name, length=max_tokens, progress=progress)
