"""What a network reads, prepared once as rows of one file: the protocol, and all images of a data set, decoded."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.errors import DataError
from qtdog.core.files import atomic_folder, lock_file, remove_leftovers, write_atomic
from qtdog.core.progress import Progress
from qtdog.data.augment import CPU, BufferPool, normalize, upload
from qtdog.data.dataset import N_THREADS, DomainDataset, ImageDataset, Resize, iter_samples, require_images
from qtdog.data.decode import DECODE_VERSION, to_square
from qtdog.data.file_index import SETTLED_NS, Hashes, file_hashes

Indices = npt.NDArray[np.integer] | Sequence[int]


class InputCache(ABC):
    """n inputs of equal size in one file, read by position; safe to use from several threads.

    Args:
        path: a file of n · row_bytes bytes.
        n: inputs.
        row_bytes: bytes of each.
    """

    def __init__(self, path: Path, n: int, row_bytes: int) -> None:
        self.path = path
        self._n = n
        self._row_bytes = row_bytes
        self._handle = os.open(path, os.O_RDONLY)
        keep_from_removal(self._handle)
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        """Return the number of inputs n."""
        return self._n

    @abstractmethod
    def gather(self, indices: Indices, pool: BufferPool | None = None) -> Tensor:
        """Return the stored inputs at `indices`, in that order.

        Args:
            indices: positions, each in [0, n).
            pool: where the memory comes from; default: fresh memory.

        Raises:
            IndexError: an index is out of range.
            DataError: the file was cut short meanwhile.
        """

    @abstractmethod
    def network_inputs(
        self, indices: Indices, mean: Sequence[float], std: Sequence[float], device: torch.device = CPU
    ) -> Tensor:
        """Return the inputs at `indices` as a network takes them in evaluation; errors as in `gather`.

        Args:
            indices: positions, each in [0, n).
            mean: per channel, of images in [0, 1].
            std: likewise.
            device: where they are wanted; the stored bytes travel there, and are normalized there.
        """

    def _read_rows(self, indices: Indices, rows: npt.NDArray[np.uint8]) -> None:
        """Read the rows at `indices` into uint8 (b, row_bytes)."""
        for row, index in zip(rows, np.asarray(indices).tolist(), strict=True):
            if not 0 <= index < self._n:
                raise IndexError(f"input {index} of {self._n}")
            if os.preadv(self._handle, [row.data], index * self._row_bytes) != self._row_bytes:
                raise DataError(f"the cache {self.path} was cut short; start again and it is rebuilt")


def keep_from_removal(handle: int) -> None:
    """Keep an open file of a cache from being removed as long as it is open, where the file system has locks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as stream:
        ...     keep_from_removal(stream.fileno())
    """
    try:
        lock_file(handle, shared=True)
    except OSError:
        return


def cache_root() -> Path:
    """Return where caches live: $QTDOG_CACHE, else $XDG_CACHE_HOME/qtdog, else ~/.cache/qtdog."""
    own = os.environ.get("QTDOG_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qtdog"


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


def write_row_hashes(place: Path, rows: Rows, hashes: Hashes) -> None:
    """Write which files the rows of the cache in `place` were made from; `hashes` is uint8 (n, 32)."""
    write_atomic(place / rows.note, np.ascontiguousarray(hashes).tobytes())


def copy_cached_rows(handle: int, rows: Rows, hashes: Hashes, caches: Path) -> Positions:
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
    for place in caches_newest_first(caches, rows):
        if not len(left):
            break
        try:
            found = find_rows(_read_hashes(place, rows), hashes[left])
            _copy(place / IMAGES, handle, found[found >= 0], left[found >= 0], rows.row_bytes)
        except OSError:  # removed meanwhile, or damaged: its rows are decoded
            continue
        left = left[found < 0]
    return left


def caches_newest_first(caches: Path, rows: Rows) -> list[Path]:
    """Return the folders of finished caches that hold such rows, the newest first."""
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


def find_rows(known: Hashes, wanted: Hashes) -> Positions:
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


def version_mark(dataset: ImageDataset, rows: Rows) -> str:
    """Return the name of the file that marks the versions of one data set among all caches.

    Two caches are versions of one data set if folder, list, domains and size are the same, and the images are not. The
    mark of images that are no files, whose folder is not known, is "".

    Example:
        >>> from qtdog.data.known_datasets import RotatedDigits
        >>> version_mark(RotatedDigits(), Rows(1797, 28, 1))
        ''
    """
    files = dataset.files()
    if files is None:
        return ""
    origin = json.dumps([files[0], dataset.card.name, dataset.domains, rows.size, rows.channels])
    return f"version-of-{hashlib.sha256(origin.encode()).hexdigest()[:24]}"


def remove_old_versions(place: Path, mark: str) -> None:
    """Remove the other caches beside `place` that have its mark.

    One that a process has open stays, and so does one that cannot be removed: the next version tries again.
    """
    for found in place.parent.glob(f"*/{mark}") if mark else ():
        if found.parent != place and not found.parent.name.startswith("."):  # those are being built
            _remove_unless_open(found.parent)


def _remove_unless_open(place: Path) -> None:
    try:
        with (place / IMAGES).open("r+b") as stream:
            if lock_file(stream.fileno()):  # without locks nobody knows who reads it
                shutil.rmtree(place)
    except OSError:
        return


MAX_LISTED = 20


class DecodedCache(InputCache):
    """n images of one size in one file.

    Args:
        path: a file of n · size · size · channels bytes.
        shape: (n, size, size, channels).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self.shape = shape
        super().__init__(path, shape[0], shape[1] * shape[2] * shape[3])

    def gather(self, indices: Indices, pool: BufferPool | None = None) -> Tensor:
        """Return the images at `indices`, uint8 (b, size, size, channels); errors as in `InputCache.gather`."""
        shape = (len(indices), *self.shape[1:])
        images = pool.take(shape, torch.uint8) if pool else torch.empty(shape, dtype=torch.uint8)
        self._read_rows(indices, images.numpy().reshape(len(indices), self._row_bytes))
        return images

    def network_inputs(
        self, indices: Indices, mean: Sequence[float], std: Sequence[float], device: torch.device = CPU
    ) -> Tensor:
        """Return the images at `indices`, normalized, float32 (b, C, size, size) in channels-last memory."""
        return normalize(upload(self.gather(indices), device), mean, std)


def content_sha256(
    dataset: DomainDataset,
    *,
    progress: Progress = None,
    folder: Path | None = None,
    settled_ns: int = SETTLED_NS,
) -> str:
    """Return the data set's `content_sha256`; no image is hashed again that is as it was.

    Files are remembered each (`data.file_index`), other data sets as a whole, by their signature; nothing is remembered
    of what changed within the last `settled_ns`.

    Raises:
        DataError: an image cannot be read.
        RunError: the cache folder cannot be written.
    """
    return content_and_hashes(dataset, progress, folder or cache_root(), settled_ns)[0]


def content_and_hashes(
    dataset: DomainDataset, progress: Progress, folder: Path, settled_ns: int = SETTLED_NS
) -> tuple[str, Hashes | None]:
    """Return the data set's content, and the sha256 of each image's file if images are files."""
    files = dataset.files() if isinstance(dataset, ImageDataset) else None
    if files is not None:
        assert isinstance(dataset, ImageDataset)
        hashes = _indexed(dataset, *files, folder, progress, settled_ns)
        return dataset.content_sha256(hashes=_as_hex(hashes)), hashes
    note = folder / "content" / dataset.signature()
    remembered = note.read_text() if note.is_file() else ""
    if len(remembered) == 64:
        return remembered, None
    content = dataset.content_sha256(progress)
    if time.time_ns() - dataset.newest_change_ns() > settled_ns:
        write_atomic(note, content)
    return content, None


def _as_hex(hashes: Hashes) -> Iterator[str]:
    """Yield the hashes as text, without half a million texts at once."""
    for start in range(0, len(hashes), 4096):
        text = hashes[start : start + 4096].tobytes().hex()
        yield from (text[i : i + 64] for i in range(0, len(text), 64))


def _indexed(
    dataset: ImageDataset, root: str, names: Sequence[str], folder: Path, progress: Progress, settled_ns: int
) -> Hashes:
    def hash_rows(rows: npt.NDArray[np.int64]) -> Iterator[str]:
        return iter_samples(lambda i: dataset.sample_sha256(int(rows[i])), len(rows), progress)

    return file_hashes(root, names, hash_rows, folder, settled_ns=settled_ns)


def open_cache(
    dataset: DomainDataset,
    image_size: int,
    *,
    progress: Progress = None,
    folder: Path | None = None,
    settled_ns: int = SETTLED_NS,
) -> DecodedCache:
    """Return the data set's images at `image_size`, decoding them now unless that was done before.

    The key is the content (not the path or the time), the size, the channels and the version of the decoder: runs share
    one cache, and a changed image makes a new one, into which the other images are copied. Building is atomic; a broken
    cache is rebuilt. Older versions of the same data set are then removed. Hashes of files changed within the last
    `settled_ns` are not remembered.

    Raises:
        DataError: images cannot be read (up to 20 are named), or the disk is too small.
        RunError: the cache folder cannot be written.
    """
    dataset, folder = require_images(dataset), folder or cache_root()
    rows = Rows(len(dataset), image_size, dataset.card.channels)
    content, hashes = content_and_hashes(dataset, progress, folder, settled_ns)
    key = hashlib.sha256(json.dumps([content, image_size, rows.channels, DECODE_VERSION]).encode()).hexdigest()
    place = folder / "decoded" / key[:24]
    file = place / IMAGES
    n_bytes, mark = rows.n * rows.row_bytes, version_mark(dataset, rows)
    if not file.is_file() or file.stat().st_size != n_bytes:
        shutil.rmtree(place, ignore_errors=True)
        _require_space(folder, n_bytes)
        remove_leftovers(place.parent)
        with atomic_folder(place) as temporary, (temporary / IMAGES).open("wb") as stream:
            missing = np.arange(rows.n)
            if hashes is not None:
                missing = copy_cached_rows(stream.fileno(), rows, hashes, place.parent)
                write_row_hashes(temporary, rows, hashes)
            _decode(dataset, rows, missing, hashes, stream.fileno(), progress)
            if mark:
                (temporary / mark).touch()
        remove_old_versions(place, mark)
    return DecodedCache(file, (rows.n, image_size, image_size, rows.channels))


def _require_space(folder: Path, n_bytes: int) -> None:
    existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise DataError(
            f"the image cache needs {n_bytes / 1e6:,.2f} MB in {folder}, but only {free / 1e6:,.2f} MB are free there: "
            "free some space, use a smaller --image-size, or set QTDOG_CACHE to a folder on another disk"
        )


def _decode(
    dataset: ImageDataset, rows: Rows, missing: Positions, hashes: Hashes | None, handle: int, progress: Progress
) -> None:
    """Decode the images at `missing` into an open file; what is decoded must be what was hashed, if it was."""
    errors: list[str] = []
    lock = threading.Lock()

    def write(i: int) -> None:
        try:
            pixels = np.ascontiguousarray(read_as_hashed(dataset, i, rows.size, hashes))
        except DataError as error:
            with lock:
                errors.append(str(error))
            return
        os.pwrite(handle, pixels.data, i * rows.row_bytes)

    n_reused = rows.n - len(missing)
    with ThreadPoolExecutor(N_THREADS) as pool:
        for start in range(0, len(missing), 256):  # in portions: Ctrl-C or twenty broken images need not wait for all
            part = missing[start : start + 256].tolist()
            list(pool.map(write, part))
            if len(errors) >= MAX_LISTED:
                break
            if progress is not None:
                progress(n_reused + start + len(part), rows.n)
    refuse_unreadable(errors)


def read_as_hashed(
    dataset: ImageDataset, i: int, size: int, hashes: Hashes | None, resize: Resize = to_square
) -> npt.NDArray[np.uint8]:
    """Return image i, resized; what is decoded must be what was hashed, if it was (DataError)."""
    if hashes is None:
        return dataset.read_resized(i, size) if resize is to_square else resize(dataset.read(i), size)
    pixels, found = dataset.read_hashed(i, size, resize)
    if bytes.fromhex(found) != hashes[i].tobytes():
        raise DataError(f"the image {dataset.keys[i]} changed while the data set was read; start again")
    return pixels


def refuse_unreadable(errors: list[str]) -> None:
    """Raise DataError with the first images that cannot be read, if there are any."""
    if not errors:
        return
    if len(errors) == 1:
        raise DataError(errors[0])
    listed = "\n  ".join(sorted(errors)[:MAX_LISTED])
    count = f"at least {MAX_LISTED}" if len(errors) >= MAX_LISTED else str(len(errors))
    raise DataError(f"{count} images cannot be read, and nothing was done:\n  {listed}")
