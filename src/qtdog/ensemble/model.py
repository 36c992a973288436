"""Several networks that predict as one: what members must have in common, the model, loading a file of either kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, FormatError
from qtdog.data.augment import normalize
from qtdog.models.network import Network, to_device_
from qtdog.packing.ensemble_file import PackedEnsemble, load_ensemble, read_packed
from qtdog.packing.packed_file import PackedModel, load_packed
from qtdog.runs.find import require_run
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

ALIKE = (*STRUCTURE, "source_domains", "target_domain")


@dataclass(frozen=True)
class Member:
    """A finished run.

    Attributes:
        path: its folder.
        config: its configuration.
        result: what it measured (`result.json`).
        packed: its model file.
        info: what the model file says of itself.
    """

    path: Path
    config: Config
    result: Mapping[str, Any] = field(repr=False)
    packed: PackedModel = field(repr=False)
    info: ModelInfo

    @property
    def traits(self) -> tuple[str, ...]:
        """What kinds of ensemble may ask for: quantized or float, averaged, any."""
        grid = "quantized" if self.packed.quantized else "float"
        return (grid, "averaged", "any") if self.config.averager.name != "none" else (grid, "any")

    @property
    def forked_from(self) -> tuple[int, int]:
        """Seed and step of the float run that it began from; its own seed and 0 if it began itself."""
        seed = self.result.get("forked_from_seed", self.config.train.seed)
        return seed, self.result.get("forked_from_step", 0)

    @property
    def init_seed(self) -> int:
        """The seed of the random start that its weights go back to."""
        given = self.config.model.init_seed
        return self.forked_from[0] if given is None else given


def read_member(path: Path) -> Member:
    """Return the finished run in a folder.

    Raises:
        RunError, ConfigError: as in `runs.find.require_run`.
        FormatError: its model file cannot be read.
    """
    run = require_run(path)
    packed = load_packed(run.folder.model_file)
    return Member(path, run.config, run.result, packed, read_info(run.folder.model_file, packed.metadata))


def check_alike(members: Sequence[Member]) -> None:
    """Refuse members that cannot form one ensemble.

    Raises:
        ConfigError: fewer than two, the same model twice, or another backbone, classes, preprocessing, source domains
            or target than the first; the text names the folders and the difference.
    """
    if len(members) < 2:
        raise ConfigError(f"an ensemble takes two runs or more, not {len(members)}")
    seen: dict[str, Path] = {}
    for member in members:
        sha = member.result["model_sha256"]
        if sha in seen:
            raise ConfigError(f"{seen[sha]} and {member.path} hold the same model; leave one out")
        seen[sha] = member.path
    first = members[0]
    for member in members[1:]:
        for name in ALIKE:
            ours, theirs = getattr(first.info, name), getattr(member.info, name)
            if ours != theirs:
                what = name.replace("_", " ")
                raise ConfigError(f"{first.path} and {member.path} differ in their {what}: {ours} and {theirs}")


def share_splits(members: Sequence[Member]) -> bool:
    """Return whether all members held out the same images.

    Where they did not, an image that one was chosen by is one that another was trained on, and there is no honest score
    of the ensemble on the source domains.
    """
    keys = ("content", "trial", "holdout_frac", "test_mode", "train_on_heldout")
    splits = {tuple(getattr(member.config.data, key) for key in keys) for member in members}
    return len(splits) == 1


def heldout_note(members: Sequence[Member]) -> str | None:
    """Return in words why there is no score of the members together on the sources, or None if there is one."""
    if not share_splits(members):
        return "the members held out different images: each was trained on some by which another was selected"
    if members[0].config.data.train_on_heldout:
        return "the members were trained on the held-out images too"
    return None


def check_one_start(members: Sequence[Member]) -> None:
    """Refuse members whose weights have no common start, so that their mean means nothing.

    Compared is what the run folders say: backbone and classes (`check_alike`), the source of the pretrained weights,
    the section `model` of the configuration, and the seed of the random start, which is that of the float run a fork
    began from. Source: Ramé et al., "Diverse Weight Averaging", NeurIPS 2022, section 3.

    Raises:
        ConfigError: naming the folders and the difference.
    """
    first = members[0]
    for member in members[1:]:
        for what, ours, theirs in _starts(first, member):
            if ours != theirs:
                text = f"the weights of {first.path} and {member.path} have no common start: {what} {ours} and {theirs}"
                hint = "Train them with --set model.init_seed=0 (one start), or with --fork-at"
                raise ConfigError(f"{text}. {hint}")


def _starts(first: Member, other: Member) -> list[tuple[str, Any, Any]]:
    models = [member.config.model.model_dump(exclude={"init_seed"}) for member in (first, other)]
    rows = [("pretraining", first.info.pretraining, other.info.pretraining)]
    rows += [(f"model.{key}", models[0][key], models[1][key]) for key in models[0]]
    return [*rows, ("the seed of the random start is", first.init_seed, other.init_seed)]


def fitting_kind(members: Sequence[Member]) -> str:
    """Return the kind of ensemble that such members make: `eoq`, `eoa` or `ensemble`.

    Raises:
        ConfigError: quantized and float members together.
    """
    for name in ("eoq", "eoa", "ensemble"):
        if all(KINDS[name].members in member.traits for member in members):
            return name
    raise ConfigError("the members are of several kinds (quantized, float, averaged): give those of one kind")


def check_kind(name: str, members: Sequence[Member]) -> None:
    """Refuse members that the kind called `name` is not made of.

    Raises:
        ConfigError: an unknown kind, or a member of another sort; the text names it.
    """
    needed = KINDS[name].members
    for member in members:
        if needed not in member.traits:
            sorts = " and ".join(trait for trait in member.traits if trait != "any")
            raise ConfigError(f"--kind {name} takes {needed} members; {member.path} is {sorts}")


BATCH = 64


@dataclass(frozen=True)
class EnsembleInfo:
    """What an ensemble file says of itself.

    Attributes:
        kind: a name of `ensemble.model.KINDS`.
        members: what each member's own file says.
        accuracy: of the ensemble: `source` (validation split of the sources) and `test`; None where not measured.
        training_steps: updates behind all members, shared steps counted once.
        training_runs: the same in lengths of one member's run.
        temperature: of the probabilities, fitted on the sources' held-out images; 1 where that was not possible.
        accept_threshold: smallest probability of an answer that is accepted, chosen on the same images; None where
            that was not possible.
    """

    kind: str
    members: tuple[ModelInfo, ...]
    accuracy: dict[str, float | None]
    training_steps: int
    training_runs: float
    temperature: float = 1.0
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
        return images if preprocessing.max_tokens else normalize(images, preprocessing.mean, preprocessing.std)

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
