"""The list of a folder's files with their hashes: written when a data set is adopted, compared by `data verify`.

`.qtdog/SHA256SUMS` has a line "hash, two blanks, path" per file, as the program `sha256sum` writes and checks it;
`.qtdog/origin.json` says where the files came from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import DataError
from qtdog.core.files import sha256_file, write_atomic
from qtdog.core.progress import Progress
from qtdog.data.dataset import map_samples

NOTES = ".qtdog"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class Changes:
    """How a folder differs from its list: relative paths, sorted."""

    missing: list[str]
    changed: list[str]
    added: list[str]


def write_hashes(root: Path, origin: dict[str, Any], progress: Progress = None) -> int:
    """Hash all files below `root`, write list and origin into it, and return how many there are."""
    keys = files_below(root)
    hashes = map_samples(lambda i: sha256_file(root / keys[i]), len(keys), progress)
    write_atomic(root / NOTES / "SHA256SUMS", "".join(f"{h}  {key}\n" for h, key in zip(hashes, keys, strict=True)))
    write_atomic(root / NOTES / "origin.json", json.dumps(origin, indent=1) + "\n")
    return len(keys)


def read_hashes(root: Path) -> dict[str, str] | None:
    """Return path → hash as listed in `root`, or None if there is no list (DataError if it is damaged)."""
    path = root / NOTES / "SHA256SUMS"
    if not path.is_file():
        return None
    matches = [LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not all(matches):
        raise DataError(
            f"{path} is damaged: each line must be a sha256, two blanks and a path. Fetch the data set anew."
        )
    return {match[2]: match[1] for match in matches if match}


def files_below(root: Path) -> list[str]:
    """Return the relative paths of all files below a folder, sorted; hidden ones do not count."""
    found = []
    for top, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        base = os.path.relpath(top, root).replace(os.sep, "/")
        found += [name if base == "." else f"{base}/{name}" for name in names if not name.startswith(".")]
    return sorted(found)


def hash_of(path: Path) -> str:
    """Return the sha256 of a file, or "" if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError:
        return ""


def compare(listed: dict[str, str], found: Iterable[tuple[str, str]]) -> Changes:
    """Return how the files that were found (path, hash or "" if unreadable) differ from the listed ones.

    Example:
        >>> compare({"a": "1", "b": "2"}, [("b", "3"), ("c", "4")])
        Changes(missing=['a'], changed=['b'], added=['c'])
    """
    now = dict(found)
    return Changes(
        missing=sorted(set(listed) - set(now)),
        changed=sorted(path for path, content in now.items() if path in listed and listed[path] != content),
        added=sorted(set(now) - set(listed)),
    )
