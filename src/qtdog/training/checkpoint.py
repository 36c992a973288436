"""Checkpoints: folders of safetensors and one JSON, written atomically, the last two kept, never a pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtdog.core.errors import FormatError
from qtdog.core.files import atomic_folder, sha256_file

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


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` as `folder/step-N`, then drop all but the last two; return the new folder.

    Raises:
        RunError: the disk is full; the older checkpoints are unchanged.
    """
    path = folder / f"step-{checkpoint.step:08d}"
    if path.exists():  # the same step again, after an interruption right behind a checkpoint
        shutil.rmtree(path)
    with atomic_folder(path) as temporary:
        hashes = {}
        for name, tensors in checkpoint.tensors.items():
            file = temporary / f"{name}.safetensors"
            save_file(_apart(tensors), file)
            hashes[name] = sha256_file(file)
        body = {"step": checkpoint.step, "files": hashes, "state": checkpoint.state}
        text = json.dumps({"sha256": _digest(body), "body": body}, indent=1)
        (temporary / "checkpoint.json").write_text(text)
    for old in checkpoint_folders(folder)[:-KEPT]:
        shutil.rmtree(old)
    return path


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
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder `path`, every byte checked against its hash.

    Raises:
        FormatError: a file is missing, truncated or altered; the text names it.
    """
    try:
        document = json.loads((path / "checkpoint.json").read_text())
        body = document["body"]
        if document["sha256"] != _digest(body):
            raise ValueError("its content does not match its checksum")
        tensors = {name: _read_part(path / f"{name}.safetensors", digest) for name, digest in body["files"].items()}
        return Checkpoint(body["step"], tensors, body["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FormatError(f"checkpoint {path} is broken: {error}") from error


def _read_part(file: Path, digest: str) -> Tensors:
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
