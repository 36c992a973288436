"""A saved model as a teacher: loading it, and what it must share with its student."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError
from qtdog.data.dataset import DomainDataset
from qtdog.ensemble.backbone_teacher import check_modes, load_backbone_teacher
from qtdog.ensemble.model import EnsembleModel, load
from qtdog.models.backbones import preprocessing
from qtdog.objectives.distill import Teacher
from qtdog.training.load_model import LoadedModel


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
