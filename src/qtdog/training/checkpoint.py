"""Checkpoints: safetensors and one JSON, written atomically, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from qtdog.conversion.attach import sites
from qtdog.core.errors import FormatError, RunError
from qtdog.core.files import clear_disk_errors, replacing_folder, sha256_file
from qtdog.core.safe_text import read_json, require_regular
from qtdog.runs.folder import RunFolder
from qtdog.training.components import Components, RunState

SEPARATOR = "|"


def plain_names(network: nn.Module, objective: nn.Module | None = None) -> dict[int, str]:
    """Return id → name of every parameter, by the names of the plain network, whatever quantizers are attached.

    A weight keeps the name that it has without quantizers; the parameters of a quantizer are `WEIGHT@NAME`, those of
    the objective `objective:NAME`. So a run can go on from the state of another that differs in its quantizer.
    """
    names = {id(value): name for name, value in network.named_parameters()}
    for site in reversed(sites(network)):  # the first name of a shared weight counts, as in the plain network
        names[id(site.weight)] = site.plain_name
        names |= {id(value): f"{site.plain_name}@{name}" for name, value in site.quantizer.named_parameters()}
    if objective is not None:
        names |= {id(value): f"objective:{name}" for name, value in objective.named_parameters()}
    return names


def flatten_optimizer(optimizer: Optimizer, names: Mapping[int, str]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the state as tensors named `parameter|key`, and the hyper-parameters of each group."""
    tensors = {
        f"{names[id(parameter)]}{SEPARATOR}{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, groups


def restore_optimizer_(
    optimizer: Optimizer, names: Mapping[int, str], tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Put back what `flatten_optimizer` took.

    Raises:
        ValueError: the optimizer has another number of groups.
        KeyError: state of a parameter that it does not hold.
    """
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"expected {len(optimizer.param_groups)} parameter groups, found {len(groups)}")
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    restore_moments_(optimizer, names, tensors)


def restore_moments_(optimizer: Optimizer, names: Mapping[int, str], tensors: dict[str, Tensor]) -> None:
    """Put back the state of every parameter, leaving the hyper-parameters of the groups as they are.

    Each moment gets the memory format of its parameter: with other strides torch takes other vector code, and the last
    bits of a resumed run would differ.

    Raises:
        KeyError: state of a parameter that the optimizer does not hold.
    """
    owners = {names[id(value)]: (value, group) for group in optimizer.param_groups for value in group["params"]}
    optimizer.state.clear()
    for name, value in tensors.items():
        owner, key = name.rsplit(SEPARATOR, 1)
        parameter, group = owners[owner]
        # A copy: Adam counts steps in place, and several runs may begin from one checkpoint.
        if key == "step":  # lies on the CPU, except where one fused kernel makes the update
            moment = value.to(parameter.device if group.get("fused") else "cpu", copy=True)
        else:
            moment = value.clone() if value.shape != parameter.shape else torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = moment.detach()


KEPT = 2
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on as if it had never stopped.

    Attributes:
        step: updates made.
        tensors: state of each part (`network`, `optimizer`, `selected`, …), flat, by part name.
        state: the JSON side: flags, records so far, hyper-parameters of the optimizer's groups.
    """

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]


def write_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, save: Callable[[Tensors, Path], None] = save_file
) -> Path:
    """Write `checkpoint` as `folder/step-N`, then drop all but the last two; return the new folder.

    Args:
        folder: of the checkpoints.
        checkpoint: what is written.
        save: writes the tensors of one part to a file.

    Raises:
        RunError: the disk is full; the older checkpoints are unchanged.
    """
    path = folder / f"step-{checkpoint.step:08d}"
    # The same step is written again after an interruption right behind a checkpoint: the old one goes when the new one
    # is whole.
    with replacing_folder(path) as temporary:
        temporary.mkdir()
        hashes = {}
        for name, tensors in checkpoint.tensors.items():
            file = temporary / f"{name}.safetensors"
            try:
                save(_apart(tensors), file)
            except SafetensorError as error:  # a full disk, among others, comes as this and not as an OSError
                if number := re.search(r"os error (\d+)", str(error)):
                    raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
                text = f"could not write {path}: {error}. The older checkpoints are unchanged."
                raise RunError(f"{text} Free some space, and start again with --resume.") from error
            hashes[name] = sha256_file(file)
        body = {"step": checkpoint.step, "files": hashes, "state": checkpoint.state}
        text = json.dumps({"sha256": _digest(body), "body": body}, indent=1)
        (temporary / "checkpoint.json").write_text(text)
    whole = checkpoint_folders(folder)
    for old in whole[:-KEPT]:
        shutil.rmtree(old)
    if len(whole) >= KEPT:
        for broken in folder.glob(f"{BROKEN}*"):
            shutil.rmtree(broken)
    return path


BROKEN = "broken-"


def put_aside_broken(folder: Path, step: int | None) -> None:
    """Rename the checkpoints behind `step`, which are broken since the run goes on from there.

    Else two of them would push out the next whole ones. They are removed when two whole ones are there. Older ones than
    are kept, which a process was killed at removing, are removed now.

    Args:
        folder: of the checkpoints.
        step: of the newest whole one; None if there is none.
    """
    for path in checkpoint_folders(folder):
        if step is None or step_of(path) > step:
            aside = path.with_name(f"{BROKEN}{path.name}")
            with clear_disk_errors(path):
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    for old in checkpoint_folders(folder)[:-KEPT]:
        shutil.rmtree(old)


def _apart(tensors: Tensors) -> Tensors:
    """Return contiguous tensors on the CPU, a weight of several names once for each: safetensors shares no memory."""
    made: Tensors = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        made[key] = value.clone() if address in seen else value
        seen.add(address)
    return made


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders below `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


NAME = re.compile(r"step-[0-9]{1,12}")


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder `path`, every byte checked against its hash.

    Raises:
        FormatError: a file is missing, truncated or altered; the text names it.
    """
    try:
        document = read_json(
            path / "checkpoint.json", max_bytes=MAX_STATE_BYTES, max_items=MAX_STATE_ITEMS, kind=FormatError
        )
        body = document["body"]
        if document["sha256"] != _digest(body):
            raise ValueError("its content does not match its checksum")
        if body["step"] != step_of(path) or not isinstance(body["state"], dict):
            raise ValueError(f"it says that it is of step {str(body['step'])[:20]}")
        if not all(PART.fullmatch(name) for name in body["files"]):
            raise ValueError("it names a file outside of its folder")
        tensors = {name: _read_part(path / f"{name}.safetensors", digest) for name, digest in body["files"].items()}
        return Checkpoint(body["step"], tensors, body["state"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, FormatError) as error:
        raise FormatError(f"checkpoint {path} is broken: {error}") from error


MAX_STATE_BYTES = 256 * 2**20
MAX_STATE_ITEMS = 2**23  # a record of every evaluation
PART = re.compile(r"\w+")


def _read_part(file: Path, digest: str) -> Tensors:
    require_regular(file, kind=FormatError)
    if sha256_file(file) != digest:
        raise ValueError(f"{file.name} does not match its checksum")
    return load_file(file)


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None if there is none.

    Each broken one on the way is named through `warn`.
    """
    for path in reversed(checkpoint_folders(folder)):
        try:
            return read_checkpoint(path)
        except FormatError as error:
            warn(f"{error}; using the one before it")
    return None


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def save_state(components: Components, folder: RunFolder, state: RunState) -> None:
    """Write a checkpoint of everything that the run needs to go on."""
    state.saved_step = state.step
    if not components.accelerator.is_main_process:
        return
    moments, groups = flatten_optimizer(components.optimizer, plain_names(components.network, components.objective))
    averaged, averager = components.averager.state()
    tensors = {"network": components.network.state_dict(), "optimizer": moments}
    tensors |= {"objective": components.objective.state_dict(), "averager": averaged}
    if state.selected is not None:
        tensors["selected"] = state.selected
    enabled = components.quantizer is not None and components.quantizer.enabled
    extra = {"optimizer_groups": groups, "quantizer_enabled": enabled, "averager": averager}
    extra |= {"n_threads": torch.get_num_threads()}
    extra["config"] = components.config.model_dump(mode="json")
    write_checkpoint(folder.checkpoints, Checkpoint(state.step, tensors, state.to_json() | extra))


def restore(components: Components, checkpoint: Checkpoint, folder: RunFolder) -> RunState:
    """Put a checkpoint of the run in `folder` into the components and return where it stood.

    Raises:
        RunError: the checkpoint does not fit the network or the optimizer.
    """
    try:
        components.network.load_state_dict(checkpoint.tensors["network"])
        components.objective.load_state_dict(checkpoint.tensors["objective"])
        names = plain_names(components.network, components.objective)
        moments, groups = checkpoint.tensors["optimizer"], checkpoint.state["optimizer_groups"]
        restore_optimizer_(components.optimizer, names, moments, groups)
        state = restore_averager_(components, checkpoint)
        if components.quantizer is not None:
            components.quantizer.set_enabled(checkpoint.state["quantizer_enabled"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"the checkpoint in {folder.checkpoints} does not fit this run: {error}") from error
    return state


def restore_averager_(components: Components, checkpoint: Checkpoint) -> RunState:
    """Put what a checkpoint holds besides the training itself into the averager, and return where the run stood.

    Raises:
        KeyError: the checkpoint is of another averager.
    """
    components.averager.restore(checkpoint.tensors["averager"], checkpoint.state["averager"])
    state = RunState.from_json(checkpoint.step, checkpoint.state)
    state.selected = checkpoint.tensors.get("selected")
    return state


def warn_of_threads(checkpoint: Checkpoint, warn: Callable[[str], None]) -> None:
    """Say through `warn` if a run goes on with another number of threads than it had.

    Sums are split among the threads, so that their last bits depend on how many there are.
    """
    before, now = checkpoint.state.get("n_threads"), torch.get_num_threads()
    if before is not None and before != now:
        text = f"the run was trained with {before} thread(s) until step {checkpoint.step} and goes on with {now}"
        warn(f"{text}: its last bits will differ from those of an undisturbed run (OMP_NUM_THREADS={before} sets them)")
