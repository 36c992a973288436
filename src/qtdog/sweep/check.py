"""Looking for mistakes before anything starts: every different configuration is put together once."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, DataError, ModelError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.ensemble.teacher import open_teacher
from qtdog.sweep.expand import raise_all
from qtdog.sweep.task import Task
from qtdog.training.build import compose, make_accelerator
from qtdog.training.protocol import make_problem

# What differs between runs without deciding whether their parts go together.
FREE = {
    "train": ("seed", "eval_every", "checkpoint_every"),
    "data": ("trial", "target", "source"),
    "model": ("init_seed",),
}


def check_tasks(tasks: Sequence[Task], dataset: DomainDataset, progress: Progress = None) -> None:
    """Refuse tasks of which one has a name that there is not, or parts that do not go together.

    Args:
        tasks: what is to be done.
        dataset: its data.
        progress: of decoding images.

    Raises:
        ConfigError: every mistake, with the method that it is in.
    """
    seen: set[str] = set()
    errors = []
    for task in tasks:
        if task.config is None or task.kind == "prefix":
            continue
        kind = _kind(task.config)
        if kind not in seen:
            seen.add(kind)
            error = _mistake(task.config, dataset, progress)
            errors += [f"method '{task.labels[0]['method']}': {error}"] if error else []
    raise_all(errors)


def _kind(config: Config) -> str:
    tree = config.model_dump(mode="json")
    for section, keys in FREE.items():
        for key in keys:
            tree[section].pop(key)
    tree["data"]["has_target"] = config.data.target != "none"
    return json.dumps(tree, sort_keys=True)


def _mistake(config: Config, dataset: DomainDataset, progress: Progress) -> str | None:
    try:
        problem = make_problem(config, dataset)
        teacher = open_teacher(config, dataset)
        compose(config, dataset, problem, make_accelerator(config), progress, teacher=teacher)
    except (ConfigError, DataError, ModelError) as error:
        return str(error)
    return None
