"""Several packed models of one architecture in one file; the ensemble section of `docs/file-format.md` is its norm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtdog.core.errors import FormatError
from qtdog.core.quantized import QuantizedTensor
from qtdog.packing.layout import Layout, Value
from qtdog.packing.packed_file import PackedModel, read_contents, save_packed
from qtdog.packing.reader import read_layout

FIELD = "ensemble"
MAX_MEMBERS = 100
NAME = re.compile(r"members\.(0|[1-9][0-9]?)\.(.+)", re.DOTALL)


def member_name(member: int, name: str) -> str:
    """Return the name in the file of a member's tensor.

    Example:
        >>> member_name(2, "classifier.weight")
        'members.2.classifier.weight'
    """
    return f"members.{member}.{name}"


def member_metadata(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each member's metadata: what all have in common, and its own.

    Example:
        >>> member_metadata({"classes": ["cat", "dog"], "ensemble": {"members": [{"step": 3}, {"step": 5}]}})
        [{'classes': ['cat', 'dog'], 'step': 3}, {'classes': ['cat', 'dog'], 'step': 5}]
    """
    common = {key: value for key, value in metadata.items() if key != FIELD}
    return [common | own for own in metadata[FIELD]["members"]]


def check_members(path: Path, layout: Layout) -> int:
    """Check that a file's description is that of an ensemble and return how many members it has.

    Raises:
        FormatError: no ensemble; a name that belongs to no member; members whose tensors differ in name or shape, or
            one that stores nothing of its own.
    """
    n_members = _count(path, layout.metadata.get(FIELD))
    stored = {name: entry.shape for name, entry in layout.quantized.items()}
    stored |= {name: info.shape for name, info in layout.rest.items()}
    shapes = stored | {alias: stored[name] for alias, name in layout.aliases.items()}
    members: list[dict[str, tuple[int, ...]]] = [{} for _ in range(n_members)]
    for full, shape in shapes.items():
        index, name = _split(path, full, n_members)
        members[index][name] = shape
    for index, member in enumerate(members):
        _require(path, member == members[0], f"member {index} should have the tensors of member 0, in name and shape")
    owners = {_split(path, full, n_members)[0] for full in stored}
    for index in range(n_members):
        _require(path, index in owners, f"member {index} should store something of its own, found only further names")
    return n_members


def _count(path: Path, ensemble: object) -> int:
    if ensemble is None:
        raise FormatError(f"{path}: one model, no ensemble (its metadata have no '{FIELD}')")
    members = ensemble.get("members") if isinstance(ensemble, dict) else None
    if isinstance(members, list) and all(isinstance(member, dict) for member in members):
        if 2 <= len(members) <= MAX_MEMBERS:
            return len(members)
        found = f"{len(members)} entries"
    else:
        found = str(members)[:80]
    raise FormatError(f"{path}: '{FIELD}' should list 2 to {MAX_MEMBERS} members as objects, found {found}")


def _split(path: Path, full: str, n_members: int) -> tuple[int, str]:
    match = NAME.fullmatch(full)
    if match is None or int(match[1]) >= n_members:
        raise FormatError(f"{path}: '{full[:80]}' belongs to none of the {n_members} members")
    return int(match[1]), match[2]


def _require(path: Path, condition: bool, problem: str) -> None:
    if not condition:
        raise FormatError(f"{path}: {problem}. The file is damaged or was not made by qtdog; get it again")


@dataclass(frozen=True)
class PackedEnsemble:
    """What an ensemble file holds; a value that members share is one object.

    Attributes:
        members: each as a file of its own would give it, its metadata whole.
        about: what the file says of the ensemble besides its members.
    """

    members: tuple[PackedModel, ...]
    about: dict[str, Any]


def save_ensemble(path: Path | str, members: Sequence[PackedModel], about: Mapping[str, Any]) -> None:
    """Write an ensemble file; the same input gives the same bytes.

    A value that several members hold bit for bit alike under one name is stored once, and so is what their metadata say
    alike.

    Args:
        path: where to; an existing file is replaced in one step.
        members: 2 to 100 models with the same names and shapes.
        about: what to say of the ensemble; JSON, without a field called `members`.

    Raises:
        FormatError: too few or too many members, members of different shapes, equal members, or what
            `packed_file.save_packed` refuses.
        RunError: the disk is full or not writable; the old file is intact.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "ensemble.safetensors"
        >>> models = [PackedModel({}, {"bias": torch.full((2,), float(seed))}, {"seed": seed}) for seed in range(2)]
        >>> save_ensemble(path, models, {"kind": "ensemble"})
        >>> load_ensemble(path).members[1].metadata
        {'seed': 1}
    """
    path = Path(path)
    if not 2 <= len(members) <= MAX_MEMBERS:
        raise FormatError(f"{path}: an ensemble has 2 to {MAX_MEMBERS} members, not {len(members)}")
    _refuse_other_shapes(path, members)
    quantized: dict[str, QuantizedTensor] = {}
    rest: dict[str, Tensor] = {}
    for index, shared in enumerate(_with_shared_values(path, members)):
        for name, value in shared.items():
            kind = quantized if isinstance(value, QuantizedTensor) else rest
            kind[member_name(index, name)] = value  # pyright: ignore[reportArgumentType]
    save_packed(path, quantized, rest, _metadata(path, members, about))


def load_ensemble(path: Path | str) -> PackedEnsemble:
    """Return the content of an ensemble file; everything that the header states is checked before memory is taken.

    Raises:
        FormatError: as in `packed_file.load_packed`; or the file holds no ensemble, or its members do not fit together.
    """
    path = Path(path)
    return _read_members(path, read_layout(path)[1])


def read_packed(path: Path | str) -> PackedModel | PackedEnsemble:
    """Return the content of a packed file, whichever it holds; its description is read and checked once.

    Raises:
        FormatError: as in `packed_file.load_packed` and `load_ensemble`.
    """
    path = Path(path)
    layout = read_layout(path)[1]
    return _read_members(path, layout) if FIELD in layout.metadata else read_contents(path, layout)


def _read_members(path: Path, layout: Layout) -> PackedEnsemble:
    n_members = check_members(path, layout)
    whole = read_contents(path, layout)
    metadata = member_metadata(layout.metadata)
    members = [PackedModel({}, {}, metadata[index]) for index in range(n_members)]
    for full, value in [*whole.quantized.items(), *whole.rest.items()]:
        _, index, name = full.split(".", 2)
        member = members[int(index)]
        if isinstance(value, QuantizedTensor):
            member.quantized[name] = value
        else:
            member.rest[name] = value
    about = {key: value for key, value in layout.metadata[FIELD].items() if key != "members"}
    return PackedEnsemble(tuple(members), about)


def is_ensemble(path: Path | str) -> bool:
    """Return whether a packed file says that it holds an ensemble; only its header is read.

    Raises:
        FormatError: no packed model file.
    """
    _, layout = read_layout(Path(path))
    return FIELD in layout.metadata


def _values(member: PackedModel) -> dict[str, Value]:
    return {**member.quantized, **member.rest}


def _refuse_other_shapes(path: Path, members: Sequence[PackedModel]) -> None:
    first, *others = ({name: _shape(value) for name, value in _values(member).items()} for member in members)
    for index, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                found = f"{first.get(name, 'nothing')} in member 0, {other.get(name, 'nothing')} in member {index}"
                raise FormatError(f"{path}: members of one ensemble have the same tensors, but '{name}' is {found}")


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(value.codes.shape if isinstance(value, QuantizedTensor) else value.shape)


def _with_shared_values(path: Path, members: Sequence[PackedModel]) -> list[dict[str, Value]]:
    """Return the members' values; one that an earlier member holds alike is that member's object."""
    made: list[dict[str, Value]] = []
    for index, member in enumerate(members):
        values = _values(member)
        for name, value in values.items():
            values[name] = next((other[name] for other in made if _alike(other[name], value)), value)
        twin = next((k for k, other in enumerate(made) if all(values[name] is other[name] for name in values)), None)
        if twin is not None:
            raise FormatError(f"{path}: members {twin} and {index} are the same model; leave one out")
        made.append(values)
    return made


def _alike(a: Value, b: Value) -> bool:
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return a.spec == b.spec and torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    if isinstance(a, QuantizedTensor) or isinstance(b, QuantizedTensor) or a.dtype != b.dtype:
        return False
    # as bytes: 0.0 and -0.0 are equal numbers, but not the same weight
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _metadata(path: Path, members: Sequence[PackedModel], about: Mapping[str, Any]) -> dict[str, Any]:
    first = members[0].metadata
    if "members" in about or any(FIELD in member.metadata for member in members):
        raise FormatError(
            f"{path}: '{FIELD}' in a member's metadata and 'members' beside it have a meaning of their own"
        )
    common = {
        key: value
        for key, value in first.items()
        if all(key in member.metadata and member.metadata[key] == value for member in members)
    }
    own = [{key: value for key, value in member.metadata.items() if key not in common} for member in members]
    return common | {FIELD: {**about, "members": own}}
