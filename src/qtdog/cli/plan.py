"""From the flags of `train` to the runs they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.config import Config, config_hash
from qtdog.core.errors import ConfigError
from qtdog.core.settings import Tree, build_config, load_preset, parse_assignment
from qtdog.data.cache import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_dataset
from qtdog.training.problem import resolve
from qtdog.training.run_folder import RunFolder

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
}


@dataclass(frozen=True)
class Planned:
    """One run to make: its effective configuration and its folder."""

    config: Config
    folder: RunFolder


@dataclass(frozen=True)
class Request:
    """What the user asked `train` for.

    Attributes:
        flags: values of the flags that name a configuration value; None where not given.
        presets: names or files, later ones on top.
        assignments: the texts of `--set`.
        members: how many runs that differ in their seed.
        out: the run folder, or the folder of run folders if there are several; None for `runs/`.
        resume: go on with what is there.
    """

    flags: Mapping[str, Any]
    presets: Sequence[str] = ()
    assignments: Sequence[str] = ()
    members: int = 1
    out: Path | None = None
    resume: bool = False


def make_plan(request: Request, progress: Progress = None) -> tuple[DomainDataset, list[Planned]]:
    """Return the data set and the runs that `request` asks for.

    Layers, later ones win: defaults, the data set's own preset (or the saved configuration of a run to resume),
    `--preset`s, flags, `--set`s.

    Raises:
        ConfigError, DataError: as in `build_config`, `open_dataset` and `resolve`.
    """
    flags = _flag_tree(request.flags)
    own = [load_preset(name) for name in request.presets]
    assigned = [parse_assignment(text) for text in request.assignments]
    saved = _saved(request)
    source = build_config([*saved, *own, flags, *assigned]).data.source
    dataset = open_dataset(source, min_domains=1)
    base = saved or [_dataset_layer(dataset, with_preset=not own)]
    config = build_config([*base, *own, flags, *assigned])
    targets = dataset.domains if config.data.target == "all" else (config.data.target,)
    seeds = [config.train.seed + member for member in range(request.members)]
    several = len(targets) * len(seeds) > 1
    plan = []
    for target in targets:
        for seed in seeds:
            one = build_config([config.model_dump(), {"data": {"target": target}, "train": {"seed": seed}}])
            one = resolve(one, dataset, progress)
            plan.append(Planned(one, RunFolder(_place(request.out, one, several=several, members=request.members))))
    return dataset, plan


def _flag_tree(flags: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for flag, value in flags.items():
        if value is not None:
            section, key = FLAGS[flag]
            tree.setdefault(section, {})[key] = value
    return tree


def _dataset_layer(dataset: DomainDataset, *, with_preset: bool) -> Tree:
    """Return what the data set's datasheet says about training on it."""
    layer: Tree = {"data": {"augment": dataset.sheet.augment}}
    if with_preset and dataset.sheet.preset:
        preset = load_preset(dataset.sheet.preset)
        layer = preset | {"data": layer["data"] | preset.get("data", {})}
    return layer


def _saved(request: Request) -> list[Tree]:
    """Return the configuration in the run folder that is to be resumed, so that no flag need be repeated."""
    if not request.resume or request.out is None:
        return []
    saved = RunFolder(request.out).read_config()
    described = [*request.presets, *request.assignments, *(v for v in request.flags.values() if v is not None)]
    if saved is None and not described:
        raise ConfigError(f"--resume: there is no run in {request.out}; check --out, or give the flags to start one")
    return [] if saved is None else [saved.model_dump()]


def _place(out: Path | None, config: Config, *, several: bool, members: int) -> Path:
    if out is None:
        return Path("runs") / config_hash(config)
    if not several:
        return out
    member = f"-seed{config.train.seed}" if members > 1 else ""
    return out / f"{config.data.target.replace('/', '_')}{member}"
