"""From a study to its tasks: runs, what they share, and the ensembles made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qtdog.core.config import config_hash
from qtdog.core.errors import ConfigError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.open import open_readable
from qtdog.sweep.expand import Point, describe, expand, raise_all, rank_of, skips_unreadable
from qtdog.sweep.sharing import keep_sharing, share_prefixes, share_updates
from qtdog.sweep.study import Ensemble, Labels, Scalar, Study
from qtdog.sweep.task import Join, Task


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
        ConfigError: as in `expand`, or members of an ensemble that the study has no run of.
        DataError: as in `data.open.open_readable` and `expand`.
    """
    source = data or study.data or "rotated-digits"
    dataset = open_readable(source, skip_unreadable=skips_unreadable(study), min_domains=1, progress=progress)
    runs = _runs(expand(study, dataset, source, progress))
    errors: list[str] = []
    ensembles = [task for one in study.ensembles for task in _ensembles(study, one, runs, errors)]
    raise_all(errors)
    tasks = share_prefixes(runs) if study.share_prefix else runs
    tasks = share_updates(tasks) if study.share_averaged else tasks
    return Plan(study, source, dataset, tuple(_in_order([*tasks, *ensembles])))


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
    found: dict[tuple[tuple[str, Scalar], ...], dict[Scalar | None, Task]] = {}
    for run in runs:
        for labels in run.labels:
            if labels["method"] == one.method and not rank_of([one.grid], labels):
                rest = tuple((name, value) for name, value in labels.items() if name not in ("method", "seed"))
                found.setdefault(rest, {})[labels.get("seed")] = run
    if not found:
        errors.append(f"ensemble '{one.name}': the study has no run of method '{one.method}' that it means")
    tasks = []
    for rest, by_seed in found.items():
        for group in one.members:
            missing = [str(seed) for seed in group if seed not in by_seed]
            labels: Labels = {"method": one.name, **dict(rest), "seed": group[0]}
            if missing:
                errors.append(f"ensemble '{one.name}': no run {describe(dict(rest))} seed={', '.join(missing)}")
                continue
            members = tuple(by_seed[seed].name for seed in group)
            rank = max(rank_of(study.order, labels), *(by_seed[seed].rank for seed in group))
            tasks.append(_join(one, members, labels, rank))
    return tasks


def _join(one: Ensemble, members: tuple[str, ...], labels: Labels, rank: int) -> Task:
    text = " ".join([one.kind, one.pick, *sorted(members)])
    name = f"{one.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return Task(name, "ensemble", rank, (labels,), join=Join(one.kind, members, one.pick))


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


def select(tasks: Sequence[Task], pattern: str) -> list[Task]:
    """Return the tasks whose labels or name contain all words of `pattern`, and what they need.

    A word `name=value` means just that label; another is looked for in the method and the folder name.

    Raises:
        ConfigError: no task is meant.

    Example:
        >>> labels = {"a1": {"method": "lsq+sma", "seed": 1}, "b2": {"method": "sma", "seed": 1}}
        >>> tasks = [Task(name, "run", 0, (one,)) for name, one in labels.items()]
        >>> [[task.name for task in select(tasks, words)] for words in ("sma seed=1", "method=sma")]
        [['a1', 'b2'], ['b2']]
    """
    words = pattern.split()
    wanted = [task for task in tasks if any(_means(words, task.name, labels) for labels in task.labels)]
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


def _means(words: Sequence[str], name: str, labels: Labels) -> bool:
    texts = {f"{key}={value}" for key, value in labels.items()}
    return all(word in texts if "=" in word else word in str(labels.get("method")) or word in name for word in words)


def default_out(study: Study) -> Path:
    """Return the folder of a study's runs if none is given."""
    return Path("runs") / study.name
