"""DART: branches that train apart, are averaged now and then, and go on from the average (Jain et al., CVPR 2023)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import differences
from qtdog.core.errors import ConfigError, RunError
from qtdog.core.files import clear_disk_errors, remove_leftovers, write_atomic
from qtdog.core.safe_text import read_json
from qtdog.data.dataset import DomainDataset
from qtdog.quantizers.registry import works_after_training
from qtdog.runs.folder import RunFolder
from qtdog.runs.selection import select
from qtdog.training.averagers import Average, State, float_names, snapshot
from qtdog.training.build import build_components, make_accelerator
from qtdog.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from qtdog.training.components import Components, RunState
from qtdog.training.evaluation import fit_batch_norm_
from qtdog.training.finalize import Final, write_run_result
from qtdog.training.run import RunCallbacks, initial_state, train_in_folder

# What may differ between branches: all that leaves the network and the held-out images alike.
FREE = ("data.augment", "data.focus", "objective.", "step_rule.", "optimizer.", "train.seed", "model.init_seed")
# Ends of the names of what every branch counts for itself: no weight depends on it.
OWN = ("num_batches_tracked", "drawn_for")


@dataclass(frozen=True)
class Branch:
    """One of the runs, at the step where `state` stands."""

    components: Components
    state: RunState
    folder: RunFolder


def dart(
    configs: Sequence[Config],
    dataset: DomainDataset,
    path: Path,
    *,
    merge_every: int,
    resume: bool = False,
    callbacks: RunCallbacks | None = None,
) -> dict[str, Any]:
    """Train branches side by side, merging them every `merge_every` steps, save a merged network, return the result.

    All begin with the same weights. At a merge each gets the mean of their weights, θ = 1/M · Σ_k θ_k (float weights
    and step sizes), keeps its optimizer's moments, and goes on (Jain et al., CVPR 2023, Algorithm 1). What makes the
    branches diverse is up to their configurations: seeds, augmentation, objectives, and `data.focus`: the paper's
    branches for domain generalization draw half of each batch from a domain of their own.

    Each merged network is evaluated, and `train.selection` of the first branch chooses among them. If the branches have
    an averager whose average is saved (`swa`, `swad`), the mean of those averages is saved instead.

    Args:
        configs: one effective configuration per branch.
        dataset: the data they name.
        path: gets a run folder per branch, the merged weights, `model.safetensors` and `result.json`. All branches are
            in memory at once.
        merge_every: steps between merges; the paper's code takes 1,000 of 10,000. The end is always a merge.
        resume: go on where the folders stand, bit for bit as if nothing had happened.
        callbacks: how to speak to the user; the callback sees one branch after the other.

    Raises:
        ConfigError: branches that differ where they may not, an averager or quantizer that cannot be merged, several
            processes, or `merge_every` below 1.
        RunError, Interrupted, NonFiniteLossError, CollapseError, DataError, ModelError: as in `training.run.run`.
    """
    check_branches(configs, merge_every)
    _claim(path, {"branches": [config_hash(config) for config in configs], "merge_every": merge_every})
    root, callbacks = RunFolder(path), callbacks or RunCallbacks()
    if (result := root.finished_result()) is not None:
        return result
    steps = configs[0].train.steps
    with contextlib.ExitStack() as locks:
        branches = [
            _open(locks, config, dataset, RunFolder(path / f"branch-{number}"), resume=resume, callbacks=callbacks)
            for number, config in enumerate(configs)
        ]
        merged = latest_checkpoint(path / "merged", callbacks.warn) or Checkpoint(0, {}, {"lines": []})
        for until in [*range(merge_every, steps, merge_every), steps]:
            for branch in branches:
                _train_until(branch, until, callbacks)
            if merged.step < until:
                merged = merge_branches(branches, merged, until)
                write_checkpoint(path / "merged", merged)
            _take(branches, merged)
        return _write_merged(branches, merged, root, merge_every)


def check_branches(configs: Sequence[Config], merge_every: int) -> None:
    """Check that branches can be merged.

    Raises:
        ConfigError: as in `dart`.
    """
    first = configs[0]
    if merge_every < 1:
        raise ConfigError(f"merge_every must be at least 1, not {merge_every}")
    if works_after_training(first.quantizer.name):
        raise ConfigError(f"quantizer '{first.quantizer.name}' works after training; branches take lsq, ste or none")
    if first.quantizer.name == "inq":
        raise ConfigError("quantizer 'inq' freezes other codes in each branch, and they have no mean; take lsq or none")
    if (name := first.averager.name) in ("sma", "ema") or first.quantizer.start_from == "average":
        raise ConfigError(f"averager '{name}' would average across the merges; take none, swa or swad for branches")
    for number, config in enumerate(configs[1:], 1):
        changes = [line for line in differences(first, config) if not line.startswith(FREE)]
        if config.init_seed != first.init_seed:
            changes.append(f"the random start ({first.init_seed} → {config.init_seed}): give model.init_seed to all")
        if changes:
            raise ConfigError(f"branches 0 and {number} cannot be merged, they differ in {'; '.join(changes)}")


def _claim(path: Path, plan: dict[str, Any]) -> None:
    file = path / "dart.json"
    if file.is_file() and read_json(file) != plan:
        raise RunError(f"{path} holds other branches, or merges them at other steps; choose another folder")
    with clear_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path / "merged")
    write_atomic(file, json.dumps(plan))


def _open(
    locks: contextlib.ExitStack,
    config: Config,
    dataset: DomainDataset,
    folder: RunFolder,
    *,
    resume: bool,
    callbacks: RunCallbacks,
) -> Branch:
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise ConfigError("branches train in one process; start without `accelerate launch`, or with --num_processes 1")
    locks.enter_context(folder.lock())
    folder.check_claim(config, resume=resume)
    components = build_components(config, dataset, accelerator, callbacks.progress)
    folder.claim(config, resume=resume)
    return Branch(components, initial_state(components, folder, callbacks.warn), folder)


def _train_until(branch: Branch, step: int, callbacks: RunCallbacks) -> None:
    if branch.state.step < step:
        train_in_folder(branch.components, branch.state, branch.folder, callbacks=callbacks, until=step)


def _take(branches: Sequence[Branch], merged: Checkpoint) -> None:
    """Give the merged weights to every branch that stands where they were merged; others went on from them before."""
    for branch in branches:
        if branch.state.step == merged.step:
            branch.components.network.load_state_dict(merged.tensors["network"], strict=False)


def merge_branches(branches: Sequence[Branch], before: Checkpoint, step: int) -> Checkpoint:
    """Return the mean of the branches at `step`, measured, with the merged network that selection prefers so far."""
    components, at_end = branches[0].components, step == branches[0].components.config.train.steps
    mean = merged_state([_weights(branch.components, at_end) for branch in branches])
    components.network.load_state_dict(mean, strict=False)
    fit_batch_norm_(components)
    state = RunState(step=step, lines=list(before.state["lines"]))
    state.add_line(components.evaluate(step, components.selectable, None).to_json())
    tensors = {"network": {name: components.network.state_dict()[name].clone() for name in mean}}
    if select(components.config.train.selection, state.records) == step or _averaged(components, at_end):
        tensors["selected"] = snapshot(components.network)
    elif "selected" in before.tensors:
        tensors["selected"] = before.tensors["selected"]
    return Checkpoint(step, tensors, {"lines": state.lines})


def merged_state(states: Sequence[State]) -> State:
    """Return the mean of the floating point entries of some networks' states, float32.

    Raises:
        ConfigError: other entries differ (codes and masks of INQ): no mean of the weights fits them.

    Example:
        >>> merged_state([{"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}])
        {'w': tensor(1.5000)}
    """
    average, first = Average(), states[0]
    for number, state in enumerate(states, 1):
        average.add_(number, state)
        for name in first.keys() - set(float_names(first)):
            if not name.endswith(OWN) and not torch.equal(state[name], first[name]):
                raise ConfigError(f"'{name}' differs between the branches, so they cannot be merged; use lsq or none")
    return average.mean


def _weights(components: Components, at_end: bool) -> dict[str, Tensor]:
    averaged = components.averager.final() if at_end else None
    return components.network.state_dict() | (averaged or {})


def _averaged(components: Components, at_end: bool) -> bool:
    return at_end and components.averager.final() is not None


def _write_merged(
    branches: Sequence[Branch],
    merged: Checkpoint,
    root: RunFolder,
    merge_every: int,
) -> dict[str, Any]:
    components, n = branches[0].components, len(branches)
    trained_s = sum(branch.state.trained_s for branch in branches)
    state = RunState(step=merged.step, lines=merged.state["lines"], trained_s=trained_s)
    chosen = select(components.config.train.selection, state.records)
    if _averaged(components, at_end=True):
        chosen = merged.step
    components.network.load_state_dict(merged.tensors["selected"])
    components.network.eval()
    record = next(record for record in state.records if record.seen.step == chosen)
    configs = [branch.components.config for branch in branches]
    apart = [line for config in configs[1:] for line in differences(configs[0], config)]
    about = {"n_branches": n, "merge_every": merge_every, "differences": apart}
    # The speed of one branch, not of all together, would be misleading beside the time of all.
    extra = {"kept": f"mean of {n} branches after update {chosen}", "dart": about, "images_per_s": None}
    write_run_result(components, state, Final(record, extra), root)
    result = root.read_result()
    assert result is not None
    return result
