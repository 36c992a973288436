"""Rows that an older cache holds already: a data set that changed is decoded only where it changed.

Beside the images of a cache lies a file with the sha256 of each image's own file. Its name says how the images were
decoded, so that rows are taken only from a cache in which the same file has the same pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qtdog.core.files import write_atomic
from qtdog.data.decode import DECODE_VERSION
from qtdog.data.index import Hashes

IMAGES = "images.u8"
HASH_BYTES = 32
CHUNK_BYTES = 1 << 22
Positions = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """What the rows of a cache are: their number, and height = width and channels of each."""

    n: int
    size: int
    channels: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.size * self.size * self.channels

    @property
    def note(self) -> str:
        """Name of the file with the hashes."""
        return f"rows-{self.size}-{self.channels}-{DECODE_VERSION}.sha256"


def keep_hashes(place: Path, rows: Rows, hashes: Hashes) -> None:
    """Write which files the rows of the cache in `place` were made from; `hashes` is uint8 (n, 32)."""
    write_atomic(place / rows.note, np.ascontiguousarray(hashes).tobytes())


def reuse_rows(handle: int, rows: Rows, hashes: Hashes, caches: Path) -> Positions:
    """Copy into an open file the rows that any cache below `caches` holds; return the positions that are left.

    Args:
        handle: the file's, open for writing.
        rows: what its rows are.
        hashes: sha256 of the file that each row is made from, uint8 (n, 32).
        caches: the folder of all caches.

    Returns:
        positions that no cache holds, ascending, int64.
    """
    left = np.arange(rows.n)
    for place in _newest_first(caches, rows):
        if not len(left):
            break
        try:
            found = _places(_read_hashes(place, rows), hashes[left])
            _copy(place / IMAGES, handle, found[found >= 0], left[found >= 0], rows.row_bytes)
        except OSError:  # removed meanwhile, or damaged: its rows are decoded
            continue
        left = left[found < 0]
    return left


def _newest_first(caches: Path, rows: Rows) -> list[Path]:
    notes: list[tuple[int, Path]] = []
    for path in caches.glob(f"*/{rows.note}"):
        with contextlib.suppress(FileNotFoundError):
            if not path.parent.name.startswith("."):  # those are being built
                notes.append((path.stat().st_mtime_ns, path.parent))
    return [place for _, place in sorted(notes, reverse=True)]


def _read_hashes(place: Path, rows: Rows) -> Hashes:
    """Return the hashes of a cache's rows, uint8 (n, 32); none if the two files do not fit each other."""
    note, images = place / rows.note, place / IMAGES
    n_hashes, rest = divmod(note.stat().st_size, HASH_BYTES)
    if rest or images.stat().st_size != n_hashes * rows.row_bytes:
        return np.empty((0, HASH_BYTES), dtype=np.uint8)
    return np.fromfile(note, dtype=np.uint8).reshape(-1, HASH_BYTES)


def _places(known: Hashes, wanted: Hashes) -> Positions:
    """Return the row of `known` that equals each row of `wanted`, or -1."""
    if not len(known):
        return np.full(len(wanted), -1)
    beginnings = _beginnings(known)
    order = np.argsort(beginnings, kind="stable")
    spots = np.searchsorted(beginnings, _beginnings(wanted), sorter=order).clip(max=len(known) - 1)
    rows = order[spots]
    return np.where((known[rows] == wanted).all(axis=1), rows, -1)


def _beginnings(hashes: Hashes) -> npt.NDArray[np.uint64]:
    """Return the first eight bytes of each hash as a number: enough to find it, not to be sure."""
    return np.ascontiguousarray(hashes[:, :8]).view(np.uint64)[:, 0]


def _copy(source: Path, handle: int, sources: Positions, targets: Positions, row_bytes: int) -> None:
    """Copy rows `sources` of a file to the rows `targets` (ascending) of an open one."""
    with source.open("rb", buffering=0) as stream:
        for first, to, n_bytes in _pieces(sources, targets, row_bytes):
            chunk = os.pread(stream.fileno(), n_bytes, first)
            if len(chunk) != n_bytes:
                raise OSError(f"{source} was cut short")
            os.pwrite(handle, chunk, to)


def _pieces(sources: Positions, targets: Positions, row_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield (place in the source, place in the target, bytes) of what is copied at once."""
    for first, to, length in _stretches(sources, targets):
        whole = length * row_bytes
        for done in range(0, whole, CHUNK_BYTES):
            yield first * row_bytes + done, to * row_bytes + done, min(CHUNK_BYTES, whole - done)


def _stretches(sources: Positions, targets: Positions) -> Iterator[tuple[int, int, int]]:
    """Yield (source, target, length) of the longest pieces that lie the same way in both."""
    ends = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    edges = [0, *ends.tolist(), len(sources)] if len(sources) else []
    for start, end in itertools.pairwise(edges):
        yield int(sources[start]), int(targets[start]), end - start
