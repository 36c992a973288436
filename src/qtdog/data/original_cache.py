"""What `data.crop: original` cuts its crops from: each image at its own aspect, as large as crops need it.

DomainBed crops the original image and resizes the crop. The square cache (`data.decoded_cache`) resizes first, which
squeezes whatever is not square and cuts fewer pixels than the result has. Here the shorter side is kept at
`kept_side(image_size)` pixels, so that no crop is ever enlarged that was not enlarged in the original as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.errors import DataError
from qtdog.core.files import atomic_folder
from qtdog.core.progress import Progress
from qtdog.data.augment import RATIO, SCALE
from qtdog.data.dataset import N_THREADS, DomainDataset, ImageDataset, require_images
from qtdog.data.decode import DECODE_VERSION, to_shorter_side
from qtdog.data.decoded_cache import (
    HASH_BYTES,
    IMAGES,
    MAX_LISTED,
    Indices,
    Rows,
    cache_root,
    caches_newest_first,
    content_and_hashes,
    find_rows,
    keep_from_removal,
    read_as_hashed,
    refuse_unreadable,
    remove_old_versions,
    version_mark,
    write_row_hashes,
)
from qtdog.data.file_index import Hashes

SHAPES = "shapes.i32"
PORTION = 64
"""So many images are decoded before they are written."""


def kept_side(image_size: int) -> int:
    """Return the shorter side at which images are kept: that of the narrowest crop is then still `image_size`.

    The shortest side of a crop is √(smallest area · smallest aspect) = √(0.7 · 3/4) = 0.72 of the image's.

    Example:
        >>> kept_side(224)
        310
    """
    return math.ceil(image_size / math.sqrt(SCALE[0] * RATIO[0]))


class OriginalCache:
    """n images, each with its own height and width, in one file; safe to use from several threads.

    Args:
        place: the folder, made by `open_originals`.
        channels: 3 or 1.
        image_size: of the resized crops.

    Attributes:
        sizes: height and width of each image, int64 (n, 2).

    Raises:
        DataError: its two files do not fit each other.
    """

    def __init__(self, place: Path, channels: int, image_size: int) -> None:
        self.path = place / IMAGES
        self.image_size = image_size
        self.channels = channels
        self.sizes = torch.from_numpy(_read_shapes(place).astype(np.int64))
        self._starts = _starts(self.sizes.numpy(), channels)
        self._handle = os.open(self.path, os.O_RDONLY)
        keep_from_removal(self._handle)
        weakref.finalize(self, os.close, self._handle)
        if os.fstat(self._handle).st_size != self._starts[-1]:
            raise DataError(f"the cache {self.path} was cut short; remove its folder and start again")

    def __len__(self) -> int:
        """Return the number of images n."""
        return len(self.sizes)

    def gather(self, indices: Indices) -> list[Tensor]:
        """Return the images at `indices`, in that order, each uint8 (H, W, channels).

        Raises:
            IndexError: an index is out of range.
            DataError: the file was cut short meanwhile.
        """
        return [self._read(int(index)) for index in indices]

    def _read(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        pixels = np.empty((*self.sizes[i].tolist(), self.channels), dtype=np.uint8)
        if os.preadv(self._handle, [pixels.data], int(self._starts[i])) != pixels.nbytes:
            raise DataError(f"the cache {self.path} was cut short; start again and it is rebuilt")
        return torch.from_numpy(pixels)


def _read_shapes(place: Path) -> npt.NDArray[np.int32]:
    return np.fromfile(place / SHAPES, dtype="<i4").reshape(-1, 2)


def _starts(shapes: npt.NDArray[np.integer], channels: int) -> npt.NDArray[np.int64]:
    """Return where each image begins in the file, and where the last one ends, in bytes."""
    return np.concatenate([[0], np.cumsum(shapes.astype(np.int64).prod(axis=1) * channels)])


def open_originals(
    dataset: DomainDataset, image_size: int, *, progress: Progress = None, folder: Path | None = None
) -> OriginalCache:
    """Return the data set's images for crops that are resized to `image_size`, decoded now unless that was done before.

    The key is the content, as in `data.decoded_cache.open_cache`, and a changed data set takes the images that older
    caches hold.

    Raises:
        DataError: images cannot be read (up to 20 are named).
        RunError: the cache folder cannot be written, or the disk is full.
    """
    folder = folder or cache_root()
    dataset = require_images(dataset)
    rows = Rows(len(dataset), kept_side(image_size), dataset.card.channels)
    content, hashes = content_and_hashes(dataset, progress, folder)
    key = hashlib.sha256(json.dumps([content, rows.size, rows.channels, DECODE_VERSION]).encode()).hexdigest()
    place = folder / "originals" / key[:24]
    if not _is_whole(place, rows):
        shutil.rmtree(place, ignore_errors=True)
        mark = version_mark(dataset, rows)
        with atomic_folder(place) as temporary:
            _build(dataset, rows, hashes, temporary, place.parent, progress)
            if hashes is not None:
                write_row_hashes(temporary, rows, hashes)
            if mark:
                (temporary / mark).touch()
        remove_old_versions(place, mark)
    return OriginalCache(place, rows.channels, image_size)


def _is_whole(place: Path, rows: Rows) -> bool:
    try:
        shapes = _read_shapes(place)
        return len(shapes) == rows.n and (place / IMAGES).stat().st_size == _starts(shapes, rows.channels)[-1]
    except (OSError, ValueError):
        return False


def _build(
    dataset: ImageDataset, rows: Rows, hashes: Hashes | None, place: Path, caches: Path, progress: Progress
) -> None:
    """Write images and shapes; what an older cache holds is copied from there."""
    find_older = _older_images(rows, hashes, caches)
    errors: list[str] = []
    lock = threading.Lock()

    def read(i: int) -> npt.NDArray[np.uint8] | None:
        try:
            pixels = find_older(i)
            if pixels is not None:
                return pixels
            return read_as_hashed(dataset, i, rows.size, hashes, to_shorter_side)
        except DataError as error:
            with lock:
                errors.append(str(error))
            return None

    tell = progress or (lambda done, n: None)
    shapes = np.zeros((rows.n, 2), dtype="<i4")
    with ThreadPoolExecutor(N_THREADS) as pool, (place / IMAGES).open("wb") as stream:
        for start in range(0, rows.n, PORTION):
            part = range(start, min(start + PORTION, rows.n))
            for i, pixels in zip(part, pool.map(read, part), strict=True):
                if pixels is not None:
                    shapes[i] = pixels.shape[:2]
                    stream.write(np.ascontiguousarray(pixels).data)
            if len(errors) >= MAX_LISTED:
                break
            tell(part.stop, rows.n)
    refuse_unreadable(errors)
    shapes.tofile(place / SHAPES)


def _older_images(rows: Rows, hashes: Hashes | None, caches: Path) -> Callable[[int], npt.NDArray[np.uint8] | None]:
    """Return a function that gives image i as the newest cache with any of the images holds it, or None."""
    if hashes is None:
        return lambda i: None
    for place in caches_newest_first(caches, rows):
        try:
            older = OriginalCache(place, rows.channels, rows.size)
            known = np.fromfile(place / rows.note, dtype=np.uint8).reshape(-1, HASH_BYTES)
        except (OSError, ValueError, DataError):  # removed meanwhile, or damaged: its images are decoded
            continue
        found = find_rows(known, hashes)
        if len(known) == len(older) and (found >= 0).any():
            return lambda i: None if found[i] < 0 else older.gather([int(found[i])])[0].numpy()
    return lambda i: None
