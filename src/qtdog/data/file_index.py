"""Hashes of many files, remembered by size, times and inode, and the list of hashes that lies beside a data set."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zipfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError
from qtdog.core.files import sha256_file, write_atomic
from qtdog.core.progress import Progress
from qtdog.data.dataset import map_samples
from qtdog.data.decode import HINT

SETTLED_NS = 2_000_000_000
"""A file changed within the last 2 s may change again without its times showing it: its hash is not remembered yet."""
UNKNOWN = -1
N_STATS = 5
MAX_INDEX_BYTES = 1 << 33

Stats = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint8]


class Index(NamedTuple):
    """What is remembered: paths, what `file_stats` says of them, int64 (n, 5), and sha256, uint8 (n, 32).

    The paths are one text with NUL between them: half a million texts would take more memory than all else here.
    """

    names: str
    stats: Stats
    hashes: Hashes

    @property
    def paths(self) -> list[str]:
        """Return the paths."""
        return self.names.split("\0") if self.names else []


def file_stats(paths: Sequence[str]) -> Stats:
    """Return size, modification and change time (ns), inode and device of each file, int64 (n, 5).

    Raises:
        DataError: a file is gone.
    """
    signed, unsigned = array("q"), array("Q")  # inode and device have 64 bits without a sign
    try:
        for found in map(os.stat, paths):
            signed.extend((found.st_size, found.st_mtime_ns, found.st_ctime_ns))
            unsigned.extend((found.st_ino, found.st_dev))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}. {HINT}") from error
    rows = np.empty((len(paths), N_STATS), dtype=np.int64)
    rows[:, :3] = np.frombuffer(signed, dtype=np.int64).reshape(-1, 3)
    rows[:, 3:] = np.frombuffer(unsigned, dtype=np.uint64).view(np.int64).reshape(-1, 2)
    return rows


def file_hashes(
    root: str,
    paths: Sequence[str],
    hash_rows: Callable[[npt.NDArray[np.int64]], list[str]],
    folder: Path,
    *,
    settled_ns: int = SETTLED_NS,
) -> Hashes:
    """Return the sha256 of each file, uint8 (n, 32), reading only those that the index does not know as they are.

    Args:
        root: the folder that the index is for.
        paths: the files; they may be some of the folder's only, and the index keeps the others.
        hash_rows: positions → hex sha256 of these files, freshly read.
        folder: where indices lie.
        settled_ns: nothing is remembered of files changed within so many ns.

    Raises:
        DataError: a file is gone or cannot be read.
        RunError: the cache folder cannot be written.
    """
    place = folder / "index" / f"{hashlib.sha256(root.encode(errors='surrogateescape')).hexdigest()[:24]}.npz"
    old, now = load_index(place), file_stats(paths)
    known, hashes = _known(old, paths, now)
    missing = np.flatnonzero(~known)
    if len(missing):
        fresh = hash_rows(missing)
        hashes[missing] = np.frombuffer(bytes.fromhex("".join(fresh)), dtype=np.uint8).reshape(-1, 32)
    if len(missing):
        _save(place, old, Index("\0".join(paths), now, hashes), settled_ns)
    return hashes


def load_index(place: Path) -> Index:
    """Return a saved index; an empty one if there is none, or a damaged one."""
    empty = Index("", np.empty((0, N_STATS), dtype=np.int64), np.empty((0, 32), dtype=np.uint8))
    try:
        if place.stat().st_size > MAX_INDEX_BYTES:
            return empty
        # opened here: NumPy leaves the file open if it is no archive
        with place.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
            names = saved["names"].tobytes().decode("utf-8", errors="surrogateescape")
            index = Index(names, saved["stats"], saved["hashes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return empty
    n = index.names.count("\0") + 1 if index.names else 0
    fits = index.stats.shape == (n, N_STATS) and index.hashes.shape == (n, 32)
    return index if fits and index.stats.dtype == np.int64 and index.hashes.dtype == np.uint8 else empty


def _known(old: Index, paths: Sequence[str], now: Stats) -> tuple[npt.NDArray[np.bool_], Hashes]:
    """Which files are as the index has them, and their hashes."""
    if len(old.stats) == len(paths) and old.names == "\0".join(paths):
        return (old.stats == now).all(axis=1), old.hashes.copy()
    row = {path: i for i, path in enumerate(old.paths)}
    rows = np.fromiter((row.get(path, UNKNOWN) for path in paths), dtype=np.int64, count=len(paths))
    known = rows != UNKNOWN
    hashes = np.zeros((len(paths), 32), dtype=np.uint8)
    hashes[known] = old.hashes[rows[known]]
    known[known] = (old.stats[rows[known]] == now[known]).all(axis=1)
    return known, hashes


def _save(place: Path, old: Index, new: Index, settled_ns: int) -> None:
    """Write the settled rows of `new`, and those of `old` whose files are still there."""
    settled = np.flatnonzero(new.stats[:, 2] < time.time_ns() - settled_ns)
    kept: list[int] = []
    names = new.names
    if old.names or len(settled) < len(new.stats):  # else all of a new folder: its names need not be taken apart
        paths, old_paths = new.paths, old.paths
        mine = set(paths)
        kept = [i for i, path in enumerate(old_paths) if path not in mine and os.path.exists(path)]
        names = "\0".join([*(paths[i] for i in settled), *(old_paths[i] for i in kept)])
    stream = BytesIO()
    np.savez(
        stream,
        names=np.frombuffer(names.encode("utf-8", errors="surrogateescape"), dtype=np.uint8),
        stats=np.concatenate([new.stats[settled], old.stats[kept]]),
        hashes=np.concatenate([new.hashes[settled], old.hashes[kept]]),
    )
    write_atomic(place, stream.getvalue())


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
    """Return the relative paths of all files below a folder, sorted; hidden ones do not count.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    found = []
    for top, folders, names in os.walk(root, followlinks=True, onerror=refuse):
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


def compare_hashes(listed: dict[str, str], found: Iterable[tuple[str, str]]) -> Changes:
    """Return how the files that were found (path, hash or "" if unreadable) differ from the listed ones.

    Example:
        >>> compare_hashes({"a": "1", "b": "2"}, [("b", "3"), ("c", "4")])
        Changes(missing=['a'], changed=['b'], added=['c'])
    """
    now = dict(found)
    return Changes(
        missing=sorted(set(listed) - set(now)),
        changed=sorted(path for path, content in now.items() if path in listed and listed[path] != content),
        added=sorted(set(now) - set(listed)),
    )
