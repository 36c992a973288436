"""Hashes of many files, remembered by size, times and inode, and the list of hashes that lies beside a data set."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import time
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError
from qtdog.core.files import atomic_stream, sha256_file, write_atomic
from qtdog.core.progress import Progress
from qtdog.data.dataset import map_samples
from qtdog.data.decode import HINT

SETTLED_NS = 2_000_000_000
"""A file changed within the last 2 s may change again without its times showing it: its hash is not remembered yet."""
UNKNOWN = -1
N_STATS = 5
MAX_INDEX_BYTES = 1 << 33
PORTION = 1 << 12
DAMAGE = (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError)
"""What reading a saved index may raise."""

Stats = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint8]


class Index(NamedTuple):
    """What is remembered: paths, what `file_stats` says of them, int64 (n, 5), and sha256, uint8 (n, 32).

    The paths are one text with NUL between them: half a million texts would take more memory than all else here.
    """

    names: bytes
    stats: Stats
    hashes: Hashes

    @property
    def paths(self) -> list[str]:
        """Return the paths."""
        return [name.decode(errors="surrogateescape") for name in self.names.split(b"\0")] if self.names else []


def file_stats(paths: Iterable[str], n: int) -> Stats:
    """Return size, modification and change time (ns), inode and device of each of n files, int64 (n, 5).

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
    rows = np.empty((n, N_STATS), dtype=np.int64)
    rows[:, :3] = np.frombuffer(signed, dtype=np.int64).reshape(-1, 3)
    rows[:, 3:] = np.frombuffer(unsigned, dtype=np.uint64).view(np.int64).reshape(-1, 2)
    return rows


def file_hashes(
    root: str,
    names: Sequence[str],
    hash_rows: Callable[[npt.NDArray[np.int64]], Iterable[str]],
    folder: Path,
    *,
    settled_ns: int = SETTLED_NS,
) -> Hashes:
    """Return the sha256 of each file, uint8 (n, 32), reading only those that the index does not know as they are.

    Args:
        root: the folder that the index is for.
        names: the files, relative to it; they may be some of the folder's only, and the index keeps the others.
        hash_rows: positions → hex sha256 of these files, freshly read.
        folder: where indices lie.
        settled_ns: nothing is remembered of files changed within so many ns.

    Raises:
        DataError: a file is gone or cannot be read.
        RunError: the cache folder cannot be written.
    """
    place = folder / "index" / f"{hashlib.sha256(root.encode(errors='surrogateescape')).hexdigest()[:24]}.npz"
    files = _Files(root, names)
    known, stats, hashes, n_others = _recall(place, files)
    missing = np.flatnonzero(~known)
    if len(missing):
        view = hashes.data.cast("B")
        for i, fresh in zip(map(int, missing), hash_rows(missing), strict=True):
            view[32 * i : 32 * i + 32] = bytes.fromhex(fresh)
        others = _others(load_index(place), files) if n_others else None
        _save(place, files, stats, hashes, others, settled_ns)
    return hashes


class _Files:
    """Files below a folder, of whose paths only few are in memory at once.

    Args:
        root: the folder.
        names: relative to it.
    """

    def __init__(self, root: str, names: Sequence[str]) -> None:
        self._prefix = f"{root}/"
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def portions(self) -> Iterator[slice]:
        """Yield the positions of some files after the others."""
        for start in range(0, len(self), PORTION):
            yield slice(start, min(start + PORTION, len(self)))

    def stats(self, part: slice) -> Stats:
        """Return `file_stats` of some files."""
        return file_stats(map(self._prefix.__add__, self._names[part]), part.stop - part.start)

    def encoded(self, part: slice) -> bytes:
        """Return the paths of some files with NUL between them."""
        text = self._prefix + f"\0{self._prefix}".join(self._names[part])
        return text.encode(errors="surrogateescape")

    def each_encoded(self) -> Iterator[bytes]:
        """Yield all paths."""
        for part in self.portions():
            yield from self.encoded(part).split(b"\0")

    def are(self, names: bytes) -> bool:
        """Return whether these are the files of an index, in the same order."""
        view, start = memoryview(names), 0
        for part in self.portions():
            wanted = self.encoded(part)
            end = start + len(wanted)
            if view[start:end] != wanted or view[end : end + 1] not in (b"\0", b""):
                return False
            start = end + 1
        return start == len(names) + 1


def _recall(place: Path, files: _Files) -> tuple[npt.NDArray[np.bool_], Stats, Hashes, int]:
    """Return which files are as the index has them, all stats, these hashes, and how many others the index has.

    The parts of the index are in memory one after the other.
    """
    n = len(files)
    try:
        with _saved(place) as saved:
            names = saved("names").tobytes()
            n_names = names.count(b"\0") + 1 if names else 0
            same = files.are(names)
            rows = np.arange(n) if same else _rows_of(files, names)
            del names
            hashes = _fitting(saved("hashes"), (n_names, 32), np.uint8)
            if not same:
                hashes = hashes[rows] if n_names else np.zeros((n, 32), dtype=np.uint8)  # -1: any row, to be replaced
            old = _fitting(saved("stats"), (n_names, N_STATS), np.int64)
    except DAMAGE:
        rows, n_names, hashes = np.full(n, UNKNOWN), 0, np.zeros((n, 32), dtype=np.uint8)
        old = np.empty((0, N_STATS), dtype=np.int64)
    known, stats = rows >= 0, np.empty((n, N_STATS), dtype=np.int64)
    n_others = n_names - int(known.sum())
    for part in files.portions():
        stats[part] = files.stats(part)
        mine = known[part]
        mine[mine] = (old[rows[part][mine]] == stats[part][mine]).all(axis=1)
    return known, stats, hashes, n_others


def _rows_of(files: _Files, names: bytes) -> npt.NDArray[np.int64]:
    """Return the row that each file has in an index, or -1: found by hashes of 64 bits, and made sure of."""
    if not names or not len(files):
        return np.full(len(files), UNKNOWN)
    ends = (match.end() for match in re.finditer(b"\0", names))
    spans = np.fromiter(itertools.chain((0,), ends, (len(names) + 1,)), np.int64)  # from where to where each path goes
    theirs = np.fromiter((hash(names[a : b - 1]) for a, b in itertools.pairwise(spans)), np.int64, len(spans) - 1)
    mine = np.fromiter(map(hash, files.each_encoded()), np.int64, len(files))
    order = np.argsort(theirs)
    places = np.searchsorted(theirs, mine, sorter=order)
    rows = order[np.minimum(places, len(order) - 1, out=places)]
    rows[theirs[rows] != mine] = UNKNOWN
    for i, path in enumerate(files.each_encoded()):
        if (row := rows[i]) >= 0 and names[spans[row] : spans[row + 1] - 1] != path:
            rows[i] = UNKNOWN
    return rows


def _others(old: Index, files: _Files) -> Index:
    """Return the rows of an index whose files are none of these and still there."""
    mine = set(files.each_encoded())
    paths = old.names.split(b"\0") if old.names else []
    kept = [i for i, path in enumerate(paths) if path not in mine and os.path.exists(path)]
    return Index(b"\0".join([paths[i] for i in kept]), old.stats[kept], old.hashes[kept])


def load_index(place: Path) -> Index:
    """Return a saved index; an empty one if there is none, or a damaged one."""
    try:
        with _saved(place) as saved:
            names = saved("names").tobytes()
            n = names.count(b"\0") + 1 if names else 0
            stats = _fitting(saved("stats"), (n, N_STATS), np.int64)
            return Index(names, stats, _fitting(saved("hashes"), (n, 32), np.uint8))
    except DAMAGE:
        return Index(b"", np.empty((0, N_STATS), dtype=np.int64), np.empty((0, 32), dtype=np.uint8))


@contextlib.contextmanager
def _saved(place: Path) -> Iterator[Callable[[str], npt.NDArray[Any]]]:
    """Yield a function that reads a part of a saved index; `DAMAGE` is raised if there is none, or a damaged one."""
    if place.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError("the index is too large")
    # opened here: NumPy leaves the file open if it is no archive
    with place.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
        yield saved.__getitem__


def _fitting(part: npt.NDArray[Any], shape: tuple[int, int], kind: type[np.generic]) -> npt.NDArray[Any]:
    if part.shape != shape or part.dtype != kind:
        raise ValueError("the parts of the index do not fit each other")
    return part


def _save(place: Path, files: _Files, stats: Stats, hashes: Hashes, others: Index | None, settled_ns: int) -> None:
    """Write the settled rows, and those of other files."""
    settled = stats[:, 2] < time.time_ns() - settled_ns
    names = bytearray()
    for part in files.portions():
        here = settled[part]
        if here.any():
            text = files.encoded(part)
            names += text if here.all() else b"\0".join(itertools.compress(text.split(b"\0"), here))
            names += b"\0"
    del names[-1:]
    if not settled.all():
        stats, hashes = stats[settled], hashes[settled]
    if others is not None and others.names:
        names += b"\0" + others.names if names else others.names
        stats, hashes = np.concatenate([stats, others.stats]), np.concatenate([hashes, others.hashes])
    parts = {"names": np.frombuffer(names, dtype=np.uint8), "stats": stats, "hashes": hashes}
    with atomic_stream(place) as stream, zipfile.ZipFile(stream, "w") as archive:
        for name, part in parts.items():  # as np.savez does, which copies 16 MB at a time
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(part))
                member.write(part.reshape(-1).view(np.uint8).data)


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
