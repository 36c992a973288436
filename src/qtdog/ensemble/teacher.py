"""Teachers: a saved model, or a pretrained backbone with an input of its own.

A backbone may be any model of timm or torchvision, or a plug-in's. Its weights stay as they are. Its features are the
lesson, or the logits of a linear head that is fitted on the features of the sources' training images. The target is
never looked at.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from qtdog.core.config import Config, ObjectiveConfig
from qtdog.core.errors import ConfigError, ModelError
from qtdog.core.files import atomic_folder
from qtdog.data.dataset import DomainDataset
from qtdog.data.decoded_cache import cache_root, open_cache
from qtdog.ensemble.model import EnsembleModel, load
from qtdog.models.backbones import preprocessing
from qtdog.models.network import FeaturizerSpec, build_featurizer, input_size, pretrained_cfg
from qtdog.models.weights import load_weights_
from qtdog.objectives.base import DomainBatch
from qtdog.objectives.wrappers import BatchTeacher, Teacher
from qtdog.training.load_model import LoadedModel, read_any_weights
from qtdog.training.protocol import TORCHVISION, make_protocol, run_labels

EVAL_BATCH = 64
RIDGE = 1e-3
"""Weight of ½‖W‖² beside the mean cross-entropy of the head, on standardized features."""


@dataclass(frozen=True)
class Lens:
    """What a backbone takes.

    Attributes:
        size: height = width, in pixels.
        mean, std: per channel, of images in [0, 1].
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """Return images that another network takes, (n, C, H, W) normalized with `mean` and `std`, as this one does."""
        pixels = images * column(std, images.dtype, images.device) + column(mean, images.dtype, images.device)
        if pixels.shape[-1] != self.size or pixels.shape[-2] != self.size:
            pixels = functional.interpolate(
                pixels, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False
            ).clamp(0, 1)
        own = [column(values, images.dtype, images.device) for values in (self.mean, self.std)]
        return (pixels - own[0]) / own[1]


@functools.lru_cache(maxsize=16)
def column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one value per channel (C, 1, 1), made once: a GPU is waited for when a tensor is made of numbers."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def build_backbone(objective: ObjectiveConfig, channels: int) -> tuple[nn.Module, Lens]:
    """Return the backbone that a configuration names, in evaluation mode, and what it takes.

    Raises:
        ModelError: it is unknown, or its weights cannot be had.
    """
    if objective.teacher.startswith(TORCHVISION):
        return _of_torchvision(objective, channels)
    size = objective.teacher_image_size or input_size(objective.teacher)
    if size is None:
        raise ModelError(f"the teacher '{objective.teacher}' reads text; a teacher of images is needed")
    spec = FeaturizerSpec(objective.teacher, channels, size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        featurizer = build_featurizer(spec)
        load_weights_(featurizer, spec, objective.teacher_weights, read=read_any_weights)
    mean, std = preprocessing(objective.teacher, channels=channels)
    return featurizer.eval().requires_grad_(False), Lens(size, tuple(mean), tuple(std))


def _of_torchvision(objective: ObjectiveConfig, channels: int) -> tuple[nn.Module, Lens]:
    from torchvision import models

    name = objective.teacher.removeprefix(TORCHVISION)
    if name not in models.list_models() or channels != 3:
        raise ModelError(f"torchvision has no model '{name}' for images of {channels} channels")
    if objective.teacher_weights not in ("imagenet", "none"):
        raise ModelError(f"objective.teacher_weights of a torchvision model is imagenet or none, not a file: {name}")
    known: Any = models.get_model_weights(name)
    weights = known.DEFAULT if objective.teacher_weights == "imagenet" else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = models.get_model(name, weights=weights)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ModelError(f"the torchvision model '{name}' ends in no linear layer, so it has no features")
    owner, _, last = linear[-1].rpartition(".")
    setattr(model.get_submodule(owner), last, nn.Identity())
    cfg = pretrained_cfg("resnet50.tv_in1k")  # ImageNet's mean and deviation, which all of them take
    size = objective.teacher_image_size or (224 if weights is None else weights.transforms().crop_size[0])
    return model.eval().requires_grad_(False), Lens(size, tuple(cfg.mean), tuple(cfg.std))


def fit_linear_head(features: Tensor, labels: Tensor, n_classes: int) -> nn.Linear:
    """Return the linear classifier with the least mean cross-entropy + 10⁻³ · ½‖W‖² on standardized features.

    The problem is convex and is solved by L-BFGS in float64 from zero, so that the same features give the same head.
    The standardization (mean and deviation of each feature over the images) is folded into the layer.

    Args:
        features: shape (n, d).
        labels: int64, shape (n,).
        n_classes: outputs.

    Example:
        >>> features = torch.tensor([[0.0, 5.0], [1.0, 5.0], [4.0, 5.0], [5.0, 5.0]])
        >>> fit_linear_head(features, torch.tensor([0, 0, 1, 1]), 2)(features).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-8, std, 1.0)
    x = (x - mean) / std
    weight = torch.zeros(n_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(x @ weight.T + bias, labels) + RIDGE / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    head = nn.Linear(x.shape[1], n_classes)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - (weight / std) @ mean)
    return head.requires_grad_(False)


class BackboneTeacher(BatchTeacher):
    """A backbone that answers for what the student sees, or for each clean image once.

    Args:
        featurizer: in evaluation mode.
        lens: what it takes.
        student: mean and deviation of the student's input.
        clean: features by dataset index, or None to see the very images that the student sees.
        head: features → logits.
    """

    def __init__(
        self,
        featurizer: nn.Module,
        lens: Lens,
        student: tuple[tuple[float, ...], tuple[float, ...]],
        *,
        head: nn.Linear,
        clean: Tensor | None,
    ) -> None:
        self.featurizer, self.lens, self.head, self.clean = featurizer, lens, head, clean
        self.mean, self.std = student
        self.n_features = head.in_features

    @torch.no_grad()
    def features(self, batch: DomainBatch) -> Tensor:
        """Return the features (n, d) for the images of a batch, on their device."""
        images = batch.images
        if self.clean is not None:
            if batch.indices is None:
                raise ValueError("a teacher of clean images needs to know which images a batch has")
            return self.clean[batch.indices.cpu()].to(images.device, non_blocking=True)
        featurizer = self.featurizer.to(images.device)
        return featurizer(self.lens.of(images.float(), self.mean, self.std))

    @torch.no_grad()
    def logits(self, batch: DomainBatch) -> Tensor:
        """Return the logits (n, n_classes) of the head."""
        return self.head.to(batch.images.device)(self.features(batch))


def load_backbone_teacher(config: Config, dataset: DomainDataset) -> BackboneTeacher:
    """Return the teacher whose backbone a configuration names, its head fitted on the sources' training images.

    The features of clean source images are computed once and kept in the cache folder, by the content of the data, the
    teacher and its image size; those of the target are never computed.

    Raises:
        ModelError: the backbone is unknown, or its weights cannot be had.
        DataError: an image cannot be decoded.
    """
    objective, channels = config.objective, dataset.card.channels
    protocol = make_protocol(config, dataset)
    featurizer, lens = build_backbone(objective, channels)
    device = Accelerator().device
    clean = {domain: _features_of(domain, config, dataset, featurizer.to(device), lens) for domain in protocol.sources}
    width = next(iter(clean.values())).shape[1]
    table = torch.full((len(dataset.class_index), width), torch.nan)
    for domain, features in clean.items():
        table[torch.from_numpy(dataset.indices(domain))] = features
    rows = torch.from_numpy(np.concatenate(list(protocol.train_pools().values())))
    labels = torch.from_numpy(run_labels(config, protocol, dataset).training.astype(np.int64))[rows]
    head = fit_linear_head(table[rows], labels, len(dataset.classes))
    mean, std = preprocessing(config.model.backbone, channels=channels)
    seen = table if objective.teacher_view == "clean" else None
    return BackboneTeacher(featurizer, lens, (tuple(mean), tuple(std)), head=head, clean=seen)


@torch.no_grad()
def _features_of(domain: str, config: Config, dataset: DomainDataset, featurizer: nn.Module, lens: Lens) -> Tensor:
    """Return the features of a domain's clean images, in the order of `dataset.indices`, from the cache if there."""
    identity = {"content": config.data.content, "domain": domain, "teacher": config.objective.teacher_sha256}
    key = hashlib.sha256(json.dumps(identity | {"size": lens.size}, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_root() / "teachers" / key
    indices = dataset.indices(domain)
    if (folder / "features.safetensors").is_file():
        kept = load_file(folder / "features.safetensors")["features"]
        if len(kept) == len(indices):
            return kept
    device = next(featurizer.parameters()).device
    cache = open_cache(dataset, lens.size)
    parts = []
    for start in range(0, len(indices), EVAL_BATCH):
        images = cache.network_inputs(indices[start : start + EVAL_BATCH], lens.mean, lens.std)
        parts.append(featurizer(images.to(device)).float().cpu())
    features = torch.cat(parts)
    if features.ndim != 2:
        raise ModelError(f"the teacher '{config.objective.teacher}' gives {tuple(features.shape)}, not features (n, d)")
    with atomic_folder(folder) as draft:
        save_file({"features": features.contiguous()}, Path(draft) / "features.safetensors")
    return features


def check_modes(objective: ObjectiveConfig) -> None:
    """Refuse options of a backbone as a teacher beside a model file.

    Raises:
        ConfigError: naming the options.
    """
    defaults: Mapping[str, object] = ObjectiveConfig().model_dump()
    given = [key for key in ("teacher_mode", "teacher_view", "teacher_image_size", "teacher_weights")
             if getattr(objective, key) != defaults[key]]  # fmt: skip
    if given:
        listed = ", ".join(f"objective.{key}" for key in given)
        raise ConfigError(f"{listed}: for a teacher that is a backbone, and {objective.teacher} is a model file")


def load_teacher(config: Config, dataset: DomainDataset) -> Teacher | None:
    """Return the teacher that a configuration names, a file or a backbone, ready to answer; None if it names none.

    Raises:
        ConfigError: the teacher has other classes or preprocessing than the student, or was trained on the domain that
            is to stay unseen.
        FormatError, ModelError: as in `ensemble.model.load`.
    """
    if not config.objective.teacher:
        return None
    path = Path(config.objective.teacher)
    if not path.is_file():
        return load_backbone_teacher(config, dataset)
    check_modes(config.objective)
    model = load(path)
    check_teacher(path, model, config, dataset)

    @torch.no_grad()
    def answer(images: Tensor) -> Tensor:
        return model.to(images.device)(images)

    return answer


def check_teacher(path: Path, model: LoadedModel | EnsembleModel, config: Config, dataset: DomainDataset) -> None:
    """Refuse a teacher that does not fit the student, or that knows what the student must not.

    Raises:
        ConfigError: as in `load_teacher`; the text says what was expected and found.
    """
    info = model.info
    if info.classes != dataset.classes:
        found, expected = ", ".join(info.classes[:9]), ", ".join(dataset.classes[:9])
        raise ConfigError(f"the teacher {path} knows the classes {found}; the data has {expected}")
    if config.data.target in info.source_domains:
        raise ConfigError(
            f"the teacher {path} was trained on '{config.data.target}', the domain that the student must not see. "
            "Take a teacher that held it out."
        )
    model_input = info.preprocessing
    mean, std = preprocessing(config.model.backbone, channels=dataset.card.channels)
    ours = (config.data.image_size, dataset.card.channels, tuple(mean), tuple(std))
    theirs = (model_input.image_size, model_input.channels, tuple(model_input.mean), tuple(model_input.std))
    if ours != theirs:
        raise ConfigError(
            f"teacher and student must see the same input (pixels, channels, mean, std): the teacher {path} takes "
            f"{theirs}, the student {ours}. Set data.image_size={model_input.image_size}, or take another backbone."
        )
