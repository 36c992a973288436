"""Several networks that predict as one, and loading a file of one network or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from qtdog.core.errors import FormatError
from qtdog.data.augment import normalise
from qtdog.models.network import Network, to_device_
from qtdog.packing.ensemble_file import PackedEnsemble, load_ensemble, read_packed
from qtdog.packing.packed_file import PackedModel
from qtdog.runs.finished import KINDS
from qtdog.training.load_model import (
    STRUCTURE,
    LoadedModel,
    ModelInfo,
    Preprocessing,
    build_networks,
    build_single_model,
    read_info,
)

BATCH = 64


@dataclass(frozen=True)
class EnsembleInfo:
    """What an ensemble file says of itself.

    Attributes:
        kind: a name of `ensemble.members.KINDS`.
        members: what each member's own file says.
        accuracy: of the ensemble: `source` (held-out part of the sources) and `test`; None where it was not measured.
        training_steps: updates behind all members, a shared beginning counted once.
        training_runs: the same in lengths of one member's run.
        temperature: of the probabilities, fitted on the sources' held-out images; 1 where that was not possible.
        cascade_threshold: confidence at which no further member need be asked (`ensemble.cascade`), chosen on the
            same images; None where that was not possible.
        accept_threshold: smallest probability of an answer that is accepted, chosen on the same images; likewise.
    """

    kind: str
    members: tuple[ModelInfo, ...]
    accuracy: dict[str, float | None]
    training_steps: int
    training_runs: float
    temperature: float = 1.0
    cascade_threshold: float | None = None
    accept_threshold: float | None = None

    @property
    def backbone(self) -> str:
        """Name of the backbone of every member."""
        return self.members[0].backbone

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.members[0].classes

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the networks' input."""
        return self.members[0].preprocessing

    @property
    def source_domains(self) -> tuple[str, ...]:
        """The domains that every member was trained on."""
        return self.members[0].source_domains

    @property
    def target_domain(self) -> str | None:
        """The domain that was held out in training, or None."""
        return self.members[0].target_domain


class EnsembleModel(nn.Module):
    """Members that run one after another; the prediction is the class with the largest mean logit.

    ŷ = argmax softmax((1/m) Σ_k f_k(x)), paper Eq. 6. One image costs m forward passes; in memory are the weights of
    all members in float32 and, without gradients, the activations of one of them.

    Attributes:
        members: the networks, in evaluation mode.
        info: what the file says of itself.
    """

    def __init__(self, members: Sequence[Network], info: EnsembleInfo) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.info = info
        self.eval()

    def member_logits(self, images: Tensor) -> Tensor:
        """Return each member's logits (m, n, n_classes) of normalized images (n, C, H, W)."""
        return torch.stack([member(images) for member in self.members])

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean logits (n, n_classes) of normalized images (n, C, H, W)."""
        return self.member_logits(images).mean(0)

    def prepare(self, images: Tensor) -> Tensor:
        """Return the networks' input (n, C, H, W) for uint8 images (n, H, W, C) of the right size."""
        preprocessing = self.info.preprocessing
        return images if preprocessing.max_tokens else normalise(images, preprocessing.mean, preprocessing.std)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities (n, n_classes) of uint8 images (n, H, W, C): softmax(mean logits / T).

        At most 64 images at a time are normalized and passed on, so that memory does not grow with n.
        """
        device = next(self.parameters()).device
        parts = [self(self.prepare(part).to(device)) for part in images.split(BATCH)]
        return (torch.cat(parts) / self.info.temperature).softmax(1)


class _About(BaseModel):
    """What a file says of the ensemble is checked like any input."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: str
    accuracy: dict[str, float | None]
    training_steps: int = Field(ge=0)
    training_runs: float = Field(ge=0)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    cascade_threshold: float | None = Field(default=None, gt=0, le=1)
    accept_threshold: float | None = Field(default=None, ge=0, le=1)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> LoadedModel | EnsembleModel:
    """Return the model in a file of `qtdog train` or `qtdog ensemble`, in evaluation mode.

    Both take normalized images in `forward` and uint8 images in `probabilities`, and have `info` with classes and
    preprocessing.

    Raises:
        FormatError: the file is missing, truncated, hostile or of another version.
        ModelError: its backbone is not known here, or does not fit.
    """
    path = Path(path)
    packed = read_packed(path)
    if isinstance(packed, PackedEnsemble):
        return build_model(path, packed.members, _read_about(path, packed), device=device)
    return build_single_model(path, packed, device=device)


def load_ensemble_model(path: str | Path, *, device: str | torch.device = "cpu") -> EnsembleModel:
    """Return the ensemble in a file, in evaluation mode; each member's logits are those of its own file, bit for bit.

    Raises:
        FormatError: as in `load`, or the file holds one model.
        ModelError: as in `load`.
    """
    path = Path(path)
    packed = load_ensemble(path)
    return build_model(path, packed.members, _read_about(path, packed), device=device)


def build_model(
    path: Path, members: Sequence[PackedModel], info: EnsembleInfo, *, device: str | torch.device = "cpu"
) -> EnsembleModel:
    """Return the members' networks as one model.

    Args:
        path: where they come from, for errors.
        members: the contents.
        info: what is said of them.
        device: where to put it.

    Raises:
        ModelError: the backbone is not known here, or does not fit.
    """
    networks = build_networks(path, members, info.members[0])
    return EnsembleModel([to_device_(network, torch.device(device)) for network in networks], info)


def _read_about(path: Path, packed: PackedEnsemble) -> EnsembleInfo:
    members = tuple(read_info(path, member.metadata) for member in packed.members)
    _check_members(path, members)
    try:
        about = _About.model_validate(packed.about)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"{path} does not describe a qtdog ensemble: {where}: {first['msg']}") from error
    known = [name for name in KINDS if not KINDS[name].one_model]
    if about.kind not in known:
        raise FormatError(f"{path}: an ensemble is {' or '.join(known)}, found '{about.kind[:40]}'")
    return EnsembleInfo(members=members, **about.model_dump())


def _check_members(path: Path, members: Sequence[ModelInfo]) -> None:
    first = members[0]
    for name in STRUCTURE:
        if any(getattr(member, name) != getattr(first, name) for member in members):
            raise FormatError(f"{path}: the members of an ensemble have one {name}, found several")
