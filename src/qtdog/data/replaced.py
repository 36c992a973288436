"""Removes a decoded cache once a newer version of the same data set has been decoded."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

from qtdog.data.dataset import DomainDataset
from qtdog.data.reuse import IMAGES, Rows


def origin_mark(dataset: DomainDataset, rows: Rows) -> str:
    """Return the name of the file that marks the versions of one data set among all caches.

    Two caches are versions of one data set if folder, list, domains and size are the same, and the images are not. The
    mark of images that are no files, whose folder is not known, is "".

    Example:
        >>> from qtdog.data.digits import RotatedDigits
        >>> origin_mark(RotatedDigits(), Rows(1797, 28, 1))
        ''
    """
    files = dataset.files()
    if files is None:
        return ""
    origin = json.dumps([files[0], dataset.sheet.name, dataset.domains, rows.size, rows.channels])
    return f"version-of-{hashlib.sha256(origin.encode()).hexdigest()[:24]}"


def hold(handle: int) -> None:
    """Keep an open file of a cache from being removed as long as it is open; where the disk knows no locks, do nothing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as stream:
        ...     hold(stream.fileno())
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return


def remove_replaced(place: Path, mark: str) -> None:
    """Remove the other caches beside `place` that have its mark.

    One that a process has open stays, and so does one that cannot be removed: the next version tries again.
    """
    for found in place.parent.glob(f"*/{mark}") if mark else ():
        if found.parent != place and not found.parent.name.startswith("."):  # those are being built
            _remove_unless_open(found.parent)


def _remove_unless_open(place: Path) -> None:
    try:
        with (place / IMAGES).open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place)
    except OSError:
        return
