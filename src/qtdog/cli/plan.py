"""From the flags of `train` to the runs they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtdog.cli.crew import Beginning, Crew, read_plan
from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import Tree, build_config, load_preset, parse_assignment
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_any, without_unreadable
from qtdog.runs.folder import RunFolder
from qtdog.training.protocol import dataset_layer, resolve

# Flag of the command line → section and key of the configuration.
FLAGS = {
    "data": ("data", "source"),
    "target": ("data", "target"),
    "image_size": ("data", "image_size"),
    "batch_size": ("data", "batch_size"),
    "trial": ("data", "trial"),
    "backbone": ("model", "backbone"),
    "weights": ("model", "weights"),
    "objective": ("objective", "name"),
    "step_rule": ("step_rule", "name"),
    "averager": ("averager", "name"),
    "quantizer": ("quantizer", "name"),
    "bits": ("quantizer", "bits"),
    "start_step": ("quantizer", "start_step"),
    "steps": ("train", "steps"),
    "seed": ("train", "seed"),
    "lr": ("optimizer", "lr"),
    "skip_unreadable": ("data", "skip_unreadable"),
}


@dataclass(frozen=True)
class Planned:
    """One run to make.

    Attributes:
        config: effective.
        folder: where.
        beginning: the float steps that it shares with other runs; None to train from its own start.
    """

    config: Config
    folder: RunFolder
    beginning: Beginning | None = None


@dataclass(frozen=True)
class Request:
    """What the user asked `train` for.

    Attributes:
        flags: values of the flags that name a configuration value; None where not given.
        presets: names or files, later ones on top.
        assignments: the texts of `--set`.
        crew: how many runs that differ in their seed, and what they share.
        out: the run folder, or the folder of run folders if there are several; None for `runs/`.
        resume: go on with what is there.
    """

    flags: Mapping[str, Any]
    presets: Sequence[str] = ()
    assignments: Sequence[str] = ()
    crew: Crew = field(default_factory=Crew)
    out: Path | None = None
    resume: bool = False


def configure(request: Request) -> tuple[DomainDataset, Config]:
    """Return the data set, of which no image is read, and the configuration that `request` describes.

    Layers, later ones win: defaults, the data set's own preset (or the saved configuration of a run to resume),
    `--preset`s, flags, `--set`s.

    Raises:
        ConfigError, DataError: as in `build_config` and `open_dataset`.
    """
    flags = _flag_tree(request.flags)
    own = [load_preset(name) for name in request.presets]
    assigned = [parse_assignment(text) for text in request.assignments]
    saved = _saved(request)
    source = build_config([*saved, *own, flags, *assigned]).data.source
    dataset = open_any(source, min_domains=1)
    base = saved or [dataset_layer(dataset, with_preset=not own)]
    return dataset, build_config([*base, *own, flags, *assigned])


def make_plan(request: Request, progress: Progress = None) -> tuple[DomainDataset, list[Planned]]:
    """Return the data set and the runs that `request` asks for: one for each target and member.

    Raises:
        ConfigError, DataError: as in `configure`, `resolve` and `Crew.check`.
    """
    request.crew.check()
    dataset, config = configure(request)
    if config.data.skip_unreadable:
        dataset = without_unreadable(dataset, progress)
    targets = dataset.domains if config.data.target == "all" else (config.data.target,)
    plan: list[Planned] = []
    content = ""  # once for all runs: with many images it takes seconds
    for target in targets:
        configs = []
        for one in _members(config, target, request.crew):
            configs.append(resolve(one, dataset, progress, content=content))
            content = configs[-1].data.content
        plan += _crew_plan(request, configs, several=len(targets) > 1)
    return dataset, plan


def _members(config: Config, target: str, crew: Crew) -> list[Config]:
    """Return the configurations of the members for one target: they differ in seed, and in trial if that is asked."""
    configs = []
    for member in range(crew.members):
        data: Tree = {"target": target}
        if crew.splits == "different":
            data["trial"] = config.data.trial + member
        configs.append(
            build_config([config.model_dump(), {"data": data, "train": {"seed": config.train.seed + member}}])
        )
    return configs


def _crew_plan(request: Request, configs: Sequence[Config], *, several: bool) -> list[Planned]:
    crew, out = request.crew, request.out
    if out is None and crew.fork_at:
        # a run with a foreign beginning must not take the name of the run that began itself
        out = Path("runs") / f"{config_hash(configs[0])}-fork-{crew.fork_at}"
    folders = [RunFolder(_place(out, one, several=several, members=crew.members)) for one in configs]
    beginning = None
    if crew.fork_at and out is not None:
        name = configs[0].data.target.replace("/", "_")
        beginning = Beginning(configs[0], RunFolder(out / f"{name}-beginning"), crew.until)
    return [Planned(one, folder, beginning) for one, folder in zip(configs, folders, strict=True)]


def with_saved_crew(request: Request) -> Request:
    """Return the request with the members that its folder was planned for, if it resumes and says nothing of members.

    Raises:
        RunError: what is remembered there is damaged.
    """
    if not request.resume or request.out is None or request.crew != Crew():
        return request
    found = read_plan(request.out)
    return request if found is None else replace(request, crew=found[1])


def _flag_tree(flags: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for flag, value in flags.items():
        if value is not None:
            section, key = FLAGS[flag]
            tree.setdefault(section, {})[key] = value
    return tree


def _saved(request: Request) -> list[Tree]:
    """Return the configuration in the run folder that is to be resumed, so that no flag need be repeated."""
    if not request.resume or request.out is None:
        return []
    planned = read_plan(request.out)
    if planned is not None:
        return [planned[0]]
    saved = RunFolder(request.out).read_config()
    described = [*request.presets, *request.assignments, *(v for v in request.flags.values() if v is not None)]
    if saved is None and not described:
        raise ConfigError(f"--resume: there is no run in {request.out}; check --out, or give the flags to start one")
    return [] if saved is None else [saved.model_dump()]


def _place(out: Path | None, config: Config, *, several: bool, members: int) -> Path:
    if out is None:
        return Path("runs") / config_hash(config)
    if not several and members == 1:
        return out
    member = f"-seed{config.train.seed}" if members > 1 else ""
    return out / f"{config.data.target.replace('/', '_')}{member}"
