"""A data set whose images are files below one folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError, nearest
from qtdog.core.files import sha256_file
from qtdog.data.dataset import DomainDataset, sample_arrays
from qtdog.data.decode import decode
from qtdog.data.sheet import Datasheet


class Record(NamedTuple):
    """One image: its domain and class, and its path relative to the data set's folder (with forward slashes)."""

    domain: str
    label: str
    key: str


class FileDataset(DomainDataset):
    """Image files below `root`, in the order of `records`.

    Args:
        sheet: the datasheet.
        root: the folder that the keys are relative to.
        records: domain, class and relative path of each image.
        classes: class names if some may have no image; default: those in the records.
    """

    def __init__(
        self, sheet: Datasheet, root: Path, records: list[Record], classes: tuple[str, ...] | None = None
    ) -> None:
        self.sheet = sheet
        self.root = root
        self.domains = tuple(sorted({record.domain for record in records}))
        self.classes = classes or tuple(sorted({record.label for record in records}))
        self.keys = [record.key for record in records]
        labels = [(record.domain, record.label) for record in records]
        self.domain_index, self.class_index = sample_arrays(self.domains, self.classes, labels)

    def path(self, i: int) -> Path:
        """Return the path of image i."""
        return self.root / self.keys[i]

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i, uint8 (H, W, C) (DataError if it cannot be read)."""
        return decode(self.path(i), self.sheet.channels)

    def signature(self) -> str:
        """Return a fingerprint of the files' names, labels, sizes and times, without reading them."""
        digest = hashlib.sha256(f"{self.root.resolve()}\0{self.domains}\0{self.classes}".encode())
        for i, key in enumerate(self.keys):
            stat = self._stat(i)
            labels = f"{self.domain_index[i]}\0{self.class_index[i]}"
            times = f"{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
            digest.update(f"\0{key}\0{labels}\0{times}".encode())
        return digest.hexdigest()

    def newest_change_ns(self) -> int:
        """Return the latest change time (ctime) of any file, ns since 1970."""
        return max(self._stat(i).st_ctime_ns for i in range(len(self)))

    def sample_sha256(self, i: int) -> str:
        """Return the sha256 of file i's bytes (DataError if it cannot be read)."""
        try:
            return sha256_file(self.path(i))
        except OSError as error:
            raise DataError(f"{self.path(i)} cannot be read: {error.strerror}") from error

    def _stat(self, i: int) -> os.stat_result:
        try:
            return os.stat(self.path(i))
        except OSError as error:
            raise DataError(f"{self.path(i)} cannot be read: {error.strerror}") from error


def require_domains(dataset: DomainDataset, min_domains: int, where: Path) -> None:
    """Raise DataError if a data set has fewer domains than are needed."""
    found = len(dataset.domains)
    if found < min_domains:
        names = ", ".join(dataset.domains)
        raise DataError(
            f"{where} has {found} domain ({names}), but domain generalization needs at least {min_domains}: "
            "lay the images out as ROOT/DOMAIN/CLASS/image with one folder per domain"
        )


def require_path(path: Path, what: str) -> None:
    """Raise DataError if `path` does not exist, naming the closest name beside it."""
    if path.exists():
        return
    parent = path.parent
    if not parent.is_dir():
        raise DataError(f"{what} {path} does not exist, and neither does its folder {parent}")
    close = nearest(path.name, [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")])
    hint = f"; did you mean {parent / close}?" if close else f"; look in {parent}"
    raise DataError(f"{what} {path} does not exist{hint}")
