"""Which runs have updates in common, so that these are made once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from qtdog.core.config import AFTER_TRAINING, Config, config_hash
from qtdog.sweep.task import Task
from qtdog.training.build import AVERAGERS
from qtdog.training.fork import prefix_config
from qtdog.training.resume import fork_obstacle


def share_prefixes(runs: Sequence[Task]) -> list[Task]:
    """Return the runs with their common beginnings as tasks of their own.

    Runs share what lies before the step at which they quantize (a float run: at which others would); also those whose
    learning rate falls only from there on. Quantization after training goes on from the last but one checkpoint of the
    same float run. A beginning that only one run has is no task. What comes out is bit-identical to separate runs.

    Args:
        runs: tasks of kind "run".
    """
    beginnings = {run.name: _beginning(run.config) for run in runs if run.config is not None}
    counts = Counter(found[0] for found in beginnings.values() if found is not None)
    floats = {run.name for run in runs}
    tasks: dict[str, Task] = {}
    for run in runs:
        assert run.config is not None
        whole = config_hash(float_run(run.config))
        found = beginnings[run.name]
        if run.config.quantizer.name in AFTER_TRAINING and whole in floats:
            tasks[run.name] = replace(run, begin=whole, step=_late(run.config))
        elif found is not None and counts[found[0]] > 1:
            name, prefix = found
            step = prefix.decay_from
            rank = min(run.rank, tasks[name].rank) if name in tasks else run.rank
            tasks[name] = Task(name, "prefix", rank, (), prefix, step)
            tasks[run.name] = replace(run, begin=name, step=step)
        else:
            tasks[run.name] = run
    return list(tasks.values())


def share_updates(runs: Sequence[Task]) -> list[Task]:
    """Return the runs; of those that differ in nothing but their averager one makes the updates for all.

    That is the one of the lowest rank. The others wait for it, and then finish from the checkpoint that they have; if
    it fails they train by themselves. What comes out is bit-identical to separate runs.

    Args:
        runs: tasks of kind "run" that share nothing yet; others are returned as they are. Runs that begin at different
            steps have no updates in common.
    """
    groups: dict[tuple[str, str, int], list[Task]] = {}
    for run in runs:
        if run.kind == "run" and run.config is not None:
            groups.setdefault((config_hash(_without_averager(run.config)), run.begin, run.step), []).append(run)
    changed: dict[str, Task] = {}
    for group in groups.values():
        first, *others = sorted(group, key=lambda run: run.rank)
        along = tuple((run.name, run.config) for run in others if run.config is not None)
        changed[first.name] = replace(first, along=along)
        changed |= {run.name: replace(run, after=first.name) for run in others}
    return [changed.get(run.name, run) for run in runs]


def keep_sharing(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks of a plan, sharing updates among themselves alone, if the plan's tasks share any.

    Example:
        >>> run = Task("b", "run", 0, config=Config(), after="a")
        >>> keep_sharing([run])[0].after, keep_sharing([Task("a", "run", 0, config=Config()), run])[1].after
        ('', 'a')
    """
    if not any(task.after or task.along for task in tasks):
        return list(tasks)
    return share_updates([replace(task, after="", along=()) for task in tasks])


def _without_averager(config: Config) -> Config:
    return config.model_copy(update={"averager": Config().averager})


def float_run(config: Config) -> Config:
    """Return the same run without a quantizer."""
    return config.model_copy(update={"quantizer": Config.model_validate({"quantizer": {"name": "none"}}).quantizer})


def _late(config: Config) -> int:
    """Return the step of the last but one checkpoint of a run that has come to its end."""
    every = config.train.checkpoint_every or config.train.eval_every
    return (config.train.steps - 1) // every * every


def _beginning(config: Config) -> tuple[str, Config] | None:
    """Return name and configuration of the float steps that a run begins with; None if it cannot take them over."""
    step = config.decay_from if config.start_step is None else config.start_step
    plain = {"schedule": "constant", "decay_from": step, "step_size_lr": 1.0}
    shared = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=plain)})
    prefix = prefix_config(shared)
    averager = AVERAGERS[config.averager.name](config.averager.params, config.start_step or 0)
    if fork_obstacle(prefix, config, averager, step):
        return None
    return f"prefix-{config_hash(prefix)}", prefix
