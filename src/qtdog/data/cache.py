"""Decode once: all images of a data set, resized, as one uint8 file that training reads slices of.

The file is read with `pread`, not mapped: mapped pages count as resident memory of the process and grow with the data
set, pages that the kernel merely caches do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.errors import DataError
from qtdog.core.files import atomic_folder, write_atomic
from qtdog.core.progress import Progress
from qtdog.data.buffers import BufferPool
from qtdog.data.dataset import N_THREADS, DomainDataset, map_samples
from qtdog.data.decode import DECODE_VERSION
from qtdog.data.index import SETTLED_NS, Hashes, file_hashes
from qtdog.data.replaced import hold, origin_mark, remove_replaced
from qtdog.data.reuse import IMAGES, Positions, Rows, keep_hashes, reuse_rows

MAX_LISTED = 20


class DecodedCache:
    """n images of one size in one file.

    Args:
        path: a file of n · size · size · channels bytes.
        shape: (n, size, size, channels).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self.path = path
        self.shape = shape
        self._row_bytes = shape[1] * shape[2] * shape[3]
        self._handle = os.open(path, os.O_RDONLY)
        hold(self._handle)
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        """Return the number of images."""
        return self.shape[0]

    def gather(self, indices: npt.NDArray[np.integer] | Sequence[int], pool: BufferPool | None = None) -> Tensor:
        """Return the images at `indices`, uint8 (b, size, size, channels). Safe to call from several threads.

        Args:
            indices: positions, each in [0, n).
            pool: where the memory comes from; default: fresh memory.

        Raises:
            IndexError: an index is out of range.
            DataError: the file was cut short meanwhile.
        """
        shape = (len(indices), *self.shape[1:])
        images = pool.take(shape, torch.uint8) if pool else torch.empty(shape, dtype=torch.uint8)
        rows = images.numpy().reshape(len(indices), self._row_bytes)
        for row, index in zip(rows, np.asarray(indices).tolist(), strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
            if os.preadv(self._handle, [row.data], index * self._row_bytes) != self._row_bytes:
                raise DataError(f"the image cache {self.path} was cut short; start again and it is rebuilt")
        return images


def cache_root() -> Path:
    """Return where caches live: $QTDOG_CACHE, else $XDG_CACHE_HOME/qtdog, else ~/.cache/qtdog."""
    own = os.environ.get("QTDOG_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qtdog"


def content_sha256(dataset: DomainDataset, *, progress: Progress = None, folder: Path | None = None) -> str:
    """Return the data set's `content_sha256`; no image is hashed again that is as it was.

    Files are remembered each (`data.index`), other data sets as a whole, by their signature.

    Raises:
        DataError: an image cannot be read.
        RunError: the cache folder cannot be written.
    """
    return _content(dataset, progress, folder or cache_root())[0]


def _content(dataset: DomainDataset, progress: Progress, folder: Path) -> tuple[str, Hashes | None]:
    """Return the data set's content, and the sha256 of each image's file if images are files."""
    files = dataset.files()
    if files is not None:
        hashes = _indexed(dataset, *files, folder, progress)
        text = hashes.tobytes().hex()
        return dataset.content_sha256(hashes=[text[i : i + 64] for i in range(0, len(text), 64)]), hashes
    note = folder / "content" / dataset.signature()
    remembered = note.read_text() if note.is_file() else ""
    if len(remembered) == 64:
        return remembered, None
    content = dataset.content_sha256(progress)
    if time.time_ns() - dataset.newest_change_ns() > SETTLED_NS:
        write_atomic(note, content)
    return content, None


def _indexed(dataset: DomainDataset, root: str, paths: list[str], folder: Path, progress: Progress) -> Hashes:
    def hash_rows(rows: npt.NDArray[np.int64]) -> list[str]:
        places = rows.tolist()
        return map_samples(lambda i: dataset.sample_sha256(places[i]), len(places), progress)

    return file_hashes(root, paths, hash_rows, folder)


def open_cache(
    dataset: DomainDataset, image_size: int, *, progress: Progress = None, folder: Path | None = None
) -> DecodedCache:
    """Return the data set's images at `image_size`, decoding them now unless that was done before.

    The key is the content (not the path or the time), the size, the channels and the version of the decoder: runs share
    one cache, and a changed image makes a new one, into which the other images are copied (`data.reuse`). Building is
    atomic; a broken cache is rebuilt. Older versions of the same data set are then removed (`data.replaced`).

    Raises:
        DataError: images cannot be read (up to 20 are named), or the disk is too small.
        RunError: the cache folder cannot be written.
    """
    folder = folder or cache_root()
    rows = Rows(len(dataset), image_size, dataset.sheet.channels)
    content, hashes = _content(dataset, progress, folder)
    key = hashlib.sha256(json.dumps([content, image_size, rows.channels, DECODE_VERSION]).encode()).hexdigest()
    place = folder / "decoded" / key[:24]
    file = place / IMAGES
    n_bytes, mark = rows.n * rows.row_bytes, origin_mark(dataset, rows)
    if not file.is_file() or file.stat().st_size != n_bytes:
        shutil.rmtree(place, ignore_errors=True)
        _require_space(folder, n_bytes)
        with atomic_folder(place) as temporary, (temporary / IMAGES).open("wb") as stream:
            missing = np.arange(rows.n)
            if hashes is not None:
                missing = reuse_rows(stream.fileno(), rows, hashes, place.parent)
                keep_hashes(temporary, rows, hashes)
            _decode(dataset, rows, missing, stream.fileno(), progress)
            if mark:
                (temporary / mark).touch()
        remove_replaced(place, mark)
    return DecodedCache(file, (rows.n, image_size, image_size, rows.channels))


def _require_space(folder: Path, n_bytes: int) -> None:
    existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise DataError(
            f"the image cache needs {n_bytes / 1e6:,.2f} MB in {folder}, but only {free / 1e6:,.2f} MB are free there: "
            "free some space, use a smaller --image-size, or set QTDOG_CACHE to a folder on another disk"
        )


def _decode(dataset: DomainDataset, rows: Rows, missing: Positions, handle: int, progress: Progress) -> None:
    """Decode the images at `missing` into an open file."""
    errors: list[str] = []
    lock = threading.Lock()

    def write(i: int) -> None:
        try:
            pixels = np.ascontiguousarray(dataset.read_resized(i, rows.size))
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
    if errors:
        _refuse(errors)


def _refuse(errors: list[str]) -> None:
    if len(errors) == 1:
        raise DataError(errors[0])
    listed = "\n  ".join(sorted(errors)[:MAX_LISTED])
    count = f"at least {MAX_LISTED}" if len(errors) >= MAX_LISTED else str(len(errors))
    raise DataError(f"{count} images cannot be read; nothing was trained:\n  {listed}")
