"""Finished runs as members of an ensemble: what all must have in common, and what can be made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError
from qtdog.packing.packed_file import PackedModel, load_packed
from qtdog.runs.find import require_run
from qtdog.runs.finished import KINDS
from qtdog.training.load_model import STRUCTURE, ModelInfo, read_info

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
        return "the members held out different images: each was trained on some that another was chosen by"
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
