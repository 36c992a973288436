"""From a study to its tasks: runs, the fork points that they share, and the ensembles made of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qtdog.core.config import AFTER_TRAINING, Config, config_hash
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_readable
from qtdog.sweep.study import (
    Ensemble,
    Labels,
    Point,
    Scalar,
    Study,
    axis_keys,
    expand,
    label_text,
    raise_all,
    rank_of,
    skips_unreadable,
    study_plugins,
)
from qtdog.training.averagers import make_averager
from qtdog.training.plugins import (
    check_reachable,
    load_entry_points,
    load_plugin_text,
    load_plugins,
    named_plugins,
    plugins_of,
)
from qtdog.training.shared_steps import fork_obstacle, fork_point_config

Kind = Literal["fork_point", "run", "ensemble"]


@dataclass(frozen=True)
class EnsembleMembers:
    """What an ensemble is made of.

    Attributes:
        kind: a name of `ensemble.model.KINDS`.
        members: folder names of the runs.
        pick: which of them diwa and soup average.
    """

    kind: str
    members: tuple[str, ...]
    pick: str = "uniform"


@dataclass(frozen=True)
class Task:
    """One piece of work; its folder below the sweep's has its name.

    Attributes:
        name: `<hash>` of a run, `prefix-<hash>` of a fork point, or `<kind>-<hash>` of an ensemble.
        kind: what it is.
        rank: tasks of a lower rank come first.
        labels: method, target, seed and the study's other axes; several where methods come to the same run.
        config: of a run or fork point.
        step: of a fork point, the updates to make; of a run, those that it takes over from `fork_from`.
        fork_from: the folder whose checkpoint it starts from; "" to train from step 0.
        updates_from: the run that makes this one's updates with its own (`share_updates`); "" if none does.
        shared_runs: of such a run, the names and configurations of those whose updates it makes.
        ensemble: its members, of an ensemble.
        plugins: path and text of the plug-ins that it needs.
    """

    name: str
    kind: Kind
    rank: int
    labels: tuple[Labels, ...] = ()
    config: Config | None = field(default=None, repr=False)
    step: int = 0
    fork_from: str = ""
    updates_from: str = ""
    shared_runs: tuple[tuple[str, Config], ...] = field(default=(), repr=False)
    ensemble: EnsembleMembers | None = None
    plugins: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the tasks that must be finished before this one."""
        return self.ensemble.members if self.ensemble else ((self.fork_from,) if self.fork_from else ())

    @property
    def text(self) -> str:
        """What the task is, for people: its first labels."""
        if self.kind == "fork_point":
            return f"shared steps {self.name.removeprefix('prefix-')}"
        return label_text(self.labels[0]) if self.labels else self.name

    @property
    def steps(self) -> int:
        """Updates that the task makes; 0 for an ensemble, and for a run whose updates another one makes."""
        if self.config is None or self.updates_from:
            return 0
        return self.step if self.kind == "fork_point" else self.config.train.steps - self.step

    def to_json(self) -> dict[str, Any]:
        """Return what a worker needs to do it."""
        config = None if self.config is None else self.config.model_dump(mode="json")
        ensemble = None if self.ensemble is None else vars(self.ensemble) | {"members": list(self.ensemble.members)}
        return {
            "name": self.name,
            "kind": self.kind,
            "rank": self.rank,
            "labels": list(self.labels),
            "config": config,
            "step": self.step,
            "fork_from": self.fork_from,
            "updates_from": self.updates_from,
            "shared_runs": [[name, config.model_dump(mode="json")] for name, config in self.shared_runs],
            "ensemble": ensemble,
            "plugins": [list(plugin) for plugin in self.plugins],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Task:
        """Return the task that `to_json` described."""
        ensemble = tree["ensemble"]
        parsed = {
            "config": None if tree["config"] is None else Config.model_validate(tree["config"]),
            "ensemble": ensemble and EnsembleMembers(**ensemble | {"members": tuple(ensemble["members"])}),
            "labels": tuple(tree["labels"]),
            "shared_runs": tuple((name, Config.model_validate(one)) for name, one in tree["shared_runs"]),
            "plugins": tuple((path, text) for path, text in tree.get("plugins", ())),
        }
        return cls(**tree | parsed)

    def load_plugins(self) -> None:
        """Run the plug-ins that it needs in this process (ConfigError if one fails)."""
        load_entry_points()
        for path, text in self.plugins:
            load_plugin_text(path, text)

    def folder(self, out: Path) -> Path:
        """Return its folder in the sweep's folder."""
        return out / self.name


def share_fork_points(runs: Sequence[Task]) -> list[Task]:
    """Return the runs, and the fork points that several of them share as tasks of their own.

    Runs share what lies before the step at which they quantize (a float run: at which others would); also those whose
    learning rate falls only from there on. Quantization after training goes on from the last but one checkpoint of the
    same float run. A fork point of one run alone is no task. What comes out is bit-identical to separate runs.

    Args:
        runs: tasks of kind "run".
    """
    fork_points = {run.name: _fork_point(run.config) for run in runs if run.config is not None}
    counts = Counter(found[0] for found in fork_points.values() if found is not None)
    floats = {run.name for run in runs}
    tasks: dict[str, Task] = {}
    for run in runs:
        assert run.config is not None
        whole = config_hash(float_run(run.config))
        found = fork_points[run.name]
        if run.config.quantizer.name in AFTER_TRAINING and whole in floats:
            tasks[run.name] = replace(run, fork_from=whole, step=_last_but_one_step(run.config))
        elif found is not None and counts[found[0]] > 1:
            name, shared = found
            step = shared.decay_from
            rank = min(run.rank, tasks[name].rank) if name in tasks else run.rank
            tasks[name] = Task(name, "fork_point", rank, (), shared, step)
            tasks[run.name] = replace(run, fork_from=name, step=step)
        else:
            tasks[run.name] = run
    return list(tasks.values())


def share_updates(runs: Sequence[Task]) -> list[Task]:
    """Return the runs; of those that differ in nothing but their averager one makes the updates for all.

    That is the run of the lowest rank. The others wait for it, and then finish from their own checkpoint; if it fails
    they train by themselves. What comes out is bit-identical to separate runs.

    Args:
        runs: tasks of kind "run" that share nothing yet; others are returned as they are. Runs that begin at different
            steps have no updates in common.
    """
    groups: dict[tuple[str, str, int], list[Task]] = {}
    for run in runs:
        if run.kind == "run" and run.config is not None:
            groups.setdefault((config_hash(_without_averager(run.config)), run.fork_from, run.step), []).append(run)
    changed: dict[str, Task] = {}
    for group in groups.values():
        first, *others = sorted(group, key=lambda run: run.rank)
        shared_runs = tuple((run.name, run.config) for run in others if run.config is not None)
        changed[first.name] = replace(first, shared_runs=shared_runs)
        changed |= {run.name: replace(run, updates_from=first.name) for run in others}
    return [changed.get(run.name, run) for run in runs]


def keep_sharing(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks of a plan, sharing updates among themselves alone, if the plan's tasks share any.

    Example:
        >>> run = Task("b", "run", 0, config=Config(), updates_from="a")
        >>> alone, both = keep_sharing([run]), keep_sharing([Task("a", "run", 0, config=Config()), run])
        >>> alone[0].updates_from, both[1].updates_from
        ('', 'a')
    """
    if not any(task.updates_from or task.shared_runs for task in tasks):
        return list(tasks)
    return share_updates([replace(task, updates_from="", shared_runs=()) for task in tasks])


def _without_averager(config: Config) -> Config:
    if config.quantizer.start_from == "average":  # its updates depend on the averager
        return config
    return config.model_copy(update={"averager": Config().averager})


def float_run(config: Config) -> Config:
    """Return the same run without a quantizer."""
    return config.model_copy(update={"quantizer": Config.model_validate({"quantizer": {"name": "none"}}).quantizer})


def _last_but_one_step(config: Config) -> int:
    """Return the step of the last but one checkpoint of a run that has come to its end."""
    every = config.train.checkpoint_every or config.train.eval_every
    return (config.train.steps - 1) // every * every


def _fork_point(config: Config) -> tuple[str, Config] | None:
    """Return name and configuration of the float steps that a run begins with; None if it cannot take them over."""
    step = config.decay_from if config.start_step is None else config.start_step
    plain = {"schedule": "constant", "decay_from": step, "step_size_lr": 1.0}
    shared = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=plain)})
    point = fork_point_config(shared)
    averager = make_averager(config)
    if fork_obstacle(point, config, averager, step):
        return None
    return f"prefix-{config_hash(point)}", point


@dataclass(frozen=True)
class Plan:
    """Everything that a study asks for.

    Attributes:
        study: the study.
        source: what opens its data.
        dataset: its data.
        tasks: in the order in which they are to be done; what a task needs comes before it.
    """

    study: Study
    source: str
    dataset: DomainDataset
    tasks: tuple[Task, ...]

    @property
    def labels(self) -> dict[str, Sequence[Labels]]:
        """What the study calls the runs, by folder name."""
        return {task.name: task.labels for task in self.tasks if task.labels}

    def __getitem__(self, name: str) -> Task:
        """Return the task called `name` (KeyError if there is none)."""
        return next(task for task in self.tasks if task.name == name)


def make_plan(study: Study, data: str | None = None, progress: Progress = None) -> Plan:
    """Return the plan of a study.

    Args:
        study: the study.
        data: where its images are; None for where the study says, or the embedded digits.
        progress: of reading images.

    Raises:
        ConfigError: as in `expand`, members of an ensemble that the study has no run of, several data sets, or a
            member of an axis that was registered in Python and that no worker would have.
        DataError: as in `data.open.open_readable` and `expand`.
    """
    if study.datasets:
        named = ", ".join(study.datasets)
        raise ConfigError(f"study {study.name} is of several data sets: qtdog reproduce FILE --dataset, one of {named}")
    load_entry_points()
    plugins_named = load_plugins(study_plugins(study))  # first: one of them may make the data set
    source = data or study.data or "rotated-digits"
    dataset = open_readable(source, skip_unreadable=skips_unreadable(study), min_domains=1, progress=progress)
    runs = _runs(expand(study, dataset, source, progress))
    check_reachable(run.config for run in runs if run.config is not None)
    errors: list[str] = []
    ensembles = [task for one in study.ensembles for task in _ensembles(study, one, runs, errors)]
    raise_all(errors)
    tasks = share_fork_points(runs) if study.share_prefix else runs
    tasks = share_updates(tasks) if study.share_averaged else tasks
    used = [one for run in runs if run.config is not None for one in plugins_of(run.config) if one.path]
    plugins = tuple((one.path, one.text) for one in named_plugins([*plugins_named, *used]))
    tasks = [replace(task, plugins=plugins) for task in _in_order([*tasks, *ensembles])]
    return Plan(study, source, dataset, tuple(tasks))


def _runs(points: Sequence[Point]) -> list[Task]:
    """Return one task for each different configuration, in the points' order."""
    tasks: dict[str, Task] = {}
    for point in points:
        name = config_hash(point.config)
        known = tasks.get(name)
        if known is None:
            tasks[name] = Task(name, "run", point.rank, (point.labels,), point.config)
        else:
            tasks[name] = replace(known, labels=(*known.labels, point.labels))
    return list(tasks.values())


def _ensembles(study: Study, one: Ensemble, runs: Sequence[Task], errors: list[str]) -> list[Task]:
    """Return the tasks of one ensemble of the study: one for each group of seeds and combination of other axes."""
    found: dict[tuple[str, tuple[tuple[str, Scalar], ...]], dict[Scalar | None, Task]] = {}
    for run in runs:
        for labels in run.labels:
            if labels["method"] == one.method and not rank_of([one.grid], labels):
                axis = _seed_axis(labels)
                rest = tuple((name, value) for name, value in labels.items() if name not in ("method", axis))
                found.setdefault((axis, rest), {})[labels.get(axis)] = run
    if not found:
        errors.append(f"ensemble '{one.name}': the study has no run of method '{one.method}' that it means")
    tasks = []
    for (axis, rest), by_seed in found.items():
        for group in one.members:
            missing = [str(seed) for seed in group if seed not in by_seed]
            labels: Labels = {"method": one.name, **dict(rest), axis: group[0]}
            if missing:
                errors.append(f"ensemble '{one.name}': no run {label_text(dict(rest))} {axis}={', '.join(missing)}")
                continue
            members = tuple(by_seed[seed].name for seed in group)
            rank = max(rank_of(study.order, labels), *(by_seed[seed].rank for seed in group))
            tasks.append(_ensemble_task(one, members, labels, rank))
    return tasks


def _seed_axis(labels: Labels) -> str:
    """Return the axis that sets the seed of training, perhaps with other values."""
    return next((name for name in labels if "train.seed" in axis_keys(name)), "seed")


def _ensemble_task(one: Ensemble, members: tuple[str, ...], labels: Labels, rank: int) -> Task:
    # until 2026-11-29 these averaged other weights: such a result in the folder is not the one that is asked for
    averaged = ["of files"] if one.kind in ("diwa", "soup") else []
    text = " ".join([one.kind, one.pick, *sorted(members), *averaged])
    name = f"{one.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return Task(name, "ensemble", rank, (labels,), ensemble=EnsembleMembers(one.kind, members, one.pick))


def _in_order(tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks by rank, each behind what it needs; among equals as they are."""
    known = {task.name: task for task in tasks}
    ordered: dict[str, Task] = {}

    def put(task: Task) -> None:
        for name in task.needs:
            if name not in ordered:
                put(known[name])
        ordered.setdefault(task.name, task)

    for task in sorted(tasks, key=lambda task: task.rank):
        put(task)
    return list(ordered.values())


def select_tasks(tasks: Sequence[Task], pattern: str) -> list[Task]:
    """Return the tasks whose labels or name contain all words of `pattern`, and what they need.

    A word `name=value` means just that label; another is looked for in the method and the folder name.

    Raises:
        ConfigError: no task is meant.

    Example:
        >>> labels = {"a1": {"method": "lsq+sma", "seed": 1}, "b2": {"method": "sma", "seed": 1}}
        >>> tasks = [Task(name, "run", 0, (one,)) for name, one in labels.items()]
        >>> [[task.name for task in select_tasks(tasks, words)] for words in ("sma seed=1", "method=sma")]
        [['a1', 'b2'], ['b2']]
    """
    words = pattern.split()
    wanted = [task for task in tasks if any(_matches(words, task.name, labels) for labels in task.labels)]
    if not wanted:
        raise ConfigError(f"--only '{pattern}' means no run of the study; qtdog sweep status --all lists them")
    return with_needs(tasks, wanted)


def with_needs(tasks: Sequence[Task], some: Sequence[Task]) -> list[Task]:
    """Return some tasks of a plan and all that they need, directly or not, in the plan's order.

    Updates are shared among these alone.
    """
    known = {task.name: task for task in tasks}
    wanted = {task.name for task in some}
    waiting = list(wanted)
    while waiting:
        needs = set(known[waiting.pop()].needs) - wanted
        wanted |= needs
        waiting += needs
    return keep_sharing([task for task in tasks if task.name in wanted])


def _matches(words: Sequence[str], name: str, labels: Labels) -> bool:
    texts = {f"{key}={value}" for key, value in labels.items()}
    return all(word in texts if "=" in word else word in str(labels.get("method")) or word in name for word in words)


def default_out(study: Study) -> Path:
    """Return the folder of a study's runs if none is given."""
    return Path("runs") / study.name
