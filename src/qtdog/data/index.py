"""Hashes of many files, remembered by size and times, so that only new and changed files are read.

One index per folder lies in the cache. It is made once and refreshed by what changed: starting with half a million
unchanged images costs half a million `stat` calls and no read.
"""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError
from qtdog.core.files import write_atomic
from qtdog.data.decode import HINT

SETTLED_NS = 2_000_000_000
"""A file changed within the last 2 s may change again without its times showing it: its hash is not remembered yet."""
UNKNOWN = -1
MAX_INDEX_BYTES = 1 << 33

Stats = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint8]


class Index(NamedTuple):
    """What is remembered: paths, their size, mtime and ctime (ns), int64 (n, 3), and sha256, uint8 (n, 32)."""

    paths: list[str]
    stats: Stats
    hashes: Hashes


def file_stats(paths: Sequence[str]) -> Stats:
    """Return size, modification and change time (ns) of each file, int64 (n, 3) (DataError if one is gone)."""
    rows = np.empty((len(paths), 3), dtype=np.int64)
    for i, path in enumerate(paths):
        try:
            stat = os.stat(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}. {HINT}") from error
        rows[i] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return rows


def file_hashes(
    root: str, paths: Sequence[str], hash_rows: Callable[[npt.NDArray[np.int64]], list[str]], folder: Path
) -> Hashes:
    """Return the sha256 of each file, uint8 (n, 32), reading only those that the index does not know as they are.

    Args:
        root: the folder that the index is for.
        paths: the files; they may be some of the folder's only, and the index keeps the others.
        hash_rows: positions → hex sha256 of these files, freshly read.
        folder: where indices lie.

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
        _save(place, old, Index(list(paths), now, hashes))
    return hashes


def load_index(place: Path) -> Index:
    """Return a saved index; an empty one if there is none, or a damaged one."""
    empty = Index([], np.empty((0, 3), dtype=np.int64), np.empty((0, 32), dtype=np.uint8))
    try:
        if place.stat().st_size > MAX_INDEX_BYTES:
            return empty
        # opened here: NumPy leaves the file open if it is no archive
        with place.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
            names = saved["names"].tobytes().decode("utf-8", errors="surrogateescape")
            index = Index(names.split("\0") if names else [], saved["stats"], saved["hashes"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return empty
    fits = index.stats.shape == (len(index.paths), 3) and index.hashes.shape == (len(index.paths), 32)
    return index if fits and index.stats.dtype == np.int64 and index.hashes.dtype == np.uint8 else empty


def _known(old: Index, paths: Sequence[str], now: Stats) -> tuple[npt.NDArray[np.bool_], Hashes]:
    """Which files are as the index has them, and their hashes."""
    if len(old.paths) == len(paths) and old.paths == list(paths):
        return (old.stats == now).all(axis=1), old.hashes.copy()
    row = {path: i for i, path in enumerate(old.paths)}
    rows = np.fromiter((row.get(path, UNKNOWN) for path in paths), dtype=np.int64, count=len(paths))
    known = rows != UNKNOWN
    hashes = np.zeros((len(paths), 32), dtype=np.uint8)
    hashes[known] = old.hashes[rows[known]]
    known[known] = (old.stats[rows[known]] == now[known]).all(axis=1)
    return known, hashes


def _save(place: Path, old: Index, new: Index) -> None:
    """Write the settled rows of `new`, and those of `old` whose files are still there."""
    settled = np.flatnonzero(new.stats[:, 2] < time.time_ns() - SETTLED_NS)
    mine = set(new.paths)
    kept = [i for i, path in enumerate(old.paths) if path not in mine and os.path.exists(path)]
    names = [*(new.paths[i] for i in settled), *(old.paths[i] for i in kept)]
    stream = BytesIO()
    np.savez(
        stream,
        names=np.frombuffer("\0".join(names).encode("utf-8", errors="surrogateescape"), dtype=np.uint8),
        stats=np.concatenate([new.stats[settled], old.stats[kept]]),
        hashes=np.concatenate([new.hashes[settled], old.hashes[kept]]),
    )
    write_atomic(place, stream.getvalue())
