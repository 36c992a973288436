"""Weights in a local file: read without running code, and fitted to a backbone by name."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qtdog.core.errors import ModelError

SUFFIXES = (".safetensors", ".pth", ".pt")
PREFIXES = ("module.", "featurizer.")
SHOWN = 3
State = Mapping[str, Tensor]


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors, .pth or .pt file.

    A .pth or .pt file is a pickle; it is read by `torch.load(weights_only=True)`, which refuses code. It holds a state
    dict, or one under the key "state_dict".

    Raises:
        ModelError: the file is missing, unreadable, holds code, or holds no state dict.
    """
    if not path.is_file():
        raise ModelError(f"weights file {path} does not exist. Give the path of a {', '.join(SUFFIXES)} file.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError as error:
        text = f"weights file {path} is refused: it holds Python code, not only tensors, or is damaged."
        raise ModelError(f"{text} Save model.state_dict() with torch.save, or use .safetensors.") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ModelError(f"weights file {path} cannot be read: {error}. It may be truncated; get it again.") from error
    return _state_dict(content, path)


def _load_pickle(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"weights file {path} holds no state dict. Save model.state_dict(), not the model.")
    for name, value in cast(Mapping[Any, Any], content).items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            text = f"weights file {path} holds no state dict: entry '{name}' is a {type(value).__name__}, not a tensor."
            raise ModelError(f"{text} Save model.state_dict(), alone or under the key 'state_dict'.")
    return dict(content)


def fit_state(found: State, expected: State, *, heads: Collection[str], where: str) -> dict[str, Tensor]:
    """Return the tensors of `found` under the names of `expected`.

    The prefixes `module.` and `featurizer.` are taken off, and the classifier is dropped. Batch norm's
    `num_batches_tracked` may be missing, as in files older than it.

    Args:
        found: the state dict of a file.
        expected: the state dict of the featurizer.
        heads: module names of the backbone's own classifier.
        where: what to call the file in an error.

    Raises:
        ModelError: tensors are missing, left over, or of another shape; the first few are listed.

    Example:
        >>> weight = torch.zeros(2)
        >>> fit_state({"module.w": weight, "fc.w": weight}, {"w": weight}, heads=["fc"], where="x.pth")
        {'w': tensor([0., 0.])}
    """
    starts = tuple(f"{head}." for head in heads)
    named = {_plain(name, expected): tensor for name, tensor in found.items()}
    fitted = {name: tensor for name, tensor in named.items() if name in expected or not name.startswith(starts)}
    problems = _shape_problems(fitted, expected) + _name_problems(fitted, expected)
    if problems:
        text = f"{where} does not fit the backbone: {'; '.join(problems)}."
        raise ModelError(f"{text} Choose the --backbone that the file was made for (and its --image-size).")
    return fitted


def _plain(name: str, expected: Collection[str]) -> str:
    while name not in expected and name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def _shape_problems(found: State, expected: State) -> list[str]:
    wrong = [
        f"{name}: expected {tuple(expected[name].shape)}, found {tuple(tensor.shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    return [_listed("of the wrong shape", wrong)] if wrong else []


def _name_problems(found: State, expected: State) -> list[str]:
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    extra = [name for name in found if name not in expected]
    listed = [("missing (expected)", missing), ("that the backbone does not have (found)", extra)]
    return [_listed(what, names) for what, names in listed if names]


def _listed(what: str, entries: list[str]) -> str:
    more = ", …" if len(entries) > SHOWN else ""
    return f"{len(entries)} tensor{'s' * (len(entries) > 1)} {what}: {', '.join(entries[:SHOWN])}{more}"
