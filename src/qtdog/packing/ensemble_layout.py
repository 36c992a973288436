"""How the members of an ensemble lie in one file: names, metadata, and the checks on both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtdog.core.errors import FormatError
from qtdog.packing.layout import Layout

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
