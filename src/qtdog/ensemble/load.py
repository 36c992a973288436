"""From a path to a model that answers, whether the file holds one network or several."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtdog.conversion.save import fill
from qtdog.core.errors import FormatError
from qtdog.ensemble.kinds import KINDS
from qtdog.ensemble.model import EnsembleInfo, EnsembleModel
from qtdog.models.network import place_
from qtdog.packing.ensemble_file import PackedEnsemble, is_ensemble, load_ensemble
from qtdog.packing.packed_file import PackedModel
from qtdog.training.load import STRUCTURE, ModelInfo, ShippedModel, load, network_for, read_info


class _About(BaseModel):
    """What a file says of the ensemble is checked like any input."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: str
    accuracy: dict[str, float | None]
    training_steps: int = Field(ge=0)
    training_runs: float = Field(ge=0)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    cascade_threshold: float | None = Field(default=None, gt=0, le=1)


def load_any(path: str | Path, *, device: str | torch.device = "cpu") -> ShippedModel | EnsembleModel:
    """Return the model in a shipped file, a single one or an ensemble, in evaluation mode.

    Both take normalised images in `forward` and uint8 images in `probabilities`, and have `info` with classes and
    preprocessing.

    Raises:
        FormatError: the file is missing, truncated, hostile or of another version.
        ModelError: its backbone is not known here, or does not fit.
    """
    return load_ensemble_model(path, device=device) if is_ensemble(path) else load(path, device=device)


def load_ensemble_model(path: str | Path, *, device: str | torch.device = "cpu") -> EnsembleModel:
    """Return the ensemble in a file, in evaluation mode; each member's logits are those of its own file, bit for bit.

    Raises:
        FormatError: as in `load_any`, or the file holds one model.
        ModelError: as in `load_any`.
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
    empty = network_for(path, members[0], info.members[0])
    networks = [fill(member, copy.deepcopy(empty), path) for member in members]
    return EnsembleModel([place_(network, torch.device(device)) for network in networks], info)


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
    told: dict[str, Any] = about.model_dump()
    return EnsembleInfo(members=members, **told)


def _check_members(path: Path, members: Sequence[ModelInfo]) -> None:
    first = members[0]
    for name in STRUCTURE:
        if any(getattr(member, name) != getattr(first, name) for member in members):
            raise FormatError(f"{path}: the members of an ensemble have one {name}, found several")
