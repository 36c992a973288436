"""A data set whose images are files below one folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError, nearest
from qtdog.data.dataset import DomainDataset, sample_arrays
from qtdog.data.decode import HINT, decode, decode_resized
from qtdog.data.sheet import Datasheet

CHUNK_BYTES = 1 << 16


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
        self._resolved = root.resolve()
        self.domains = tuple(sorted({record.domain for record in records}))
        self.classes = classes or tuple(sorted({record.label for record in records}))
        self.keys = [record.key for record in records]
        labels = [(record.domain, record.label) for record in records]
        self.domain_index, self.class_index = sample_arrays(self.domains, self.classes, labels)

    def path(self, i: int) -> Path:
        """Return the path of image i."""
        return self.root / self.keys[i]

    def files(self) -> tuple[str, list[str]]:
        """Return the folder, with links resolved, and the path of each image."""
        return str(self._resolved), [f"{self._resolved}/{key}" for key in self.keys]

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i, uint8 (H, W, C) (DataError if it cannot be read)."""
        return decode(self.path(i), self.sheet.channels)

    def read_resized(self, i: int, size: int) -> npt.NDArray[np.uint8]:
        """Return image i as uint8 (size, size, C), resized without cropping (DataError if unreadable)."""
        return decode_resized(self.path(i), size, self.sheet.channels)

    def sample_signature(self, i: int) -> str:
        """Return the folder of the data set, and size and times of file i, which is not read."""
        stat = self._stat(i)
        return f"{self._resolved}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}"

    def sample_change_ns(self, i: int) -> int:
        """Return the change time (ctime) of file i, ns since 1970."""
        return self._stat(i).st_ctime_ns

    def sample_sha256(self, i: int) -> str:
        """Return the sha256 of file i's bytes (DataError if it cannot be read)."""
        try:
            return _sha256(f"{self._resolved}/{self.keys[i]}")
        except OSError as error:
            raise DataError(f"{self.path(i)} cannot be read: {error.strerror}. {HINT}") from error

    def _stat(self, i: int) -> os.stat_result:
        try:
            return os.stat(self.path(i))
        except OSError as error:
            raise DataError(f"{self.path(i)} cannot be read: {error.strerror}. {HINT}") from error


def _sha256(path: str) -> str:
    """Hash one file; a small one, as images are, in a fifth of the time that `hashlib.file_digest` takes."""
    with open(path, "rb", buffering=0) as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
    if path.is_symlink():
        raise DataError(f"{what} {path} is a link to {path.readlink()}, which does not exist")
    parent = path.parent
    if not parent.is_dir():
        raise DataError(f"{what} {path} does not exist, and neither does its folder {parent}")
    close = nearest(path.name, [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")])
    hint = f"; did you mean {parent / close}?" if close else f"; look in {parent}"
    raise DataError(f"{what} {path} does not exist{hint}")
