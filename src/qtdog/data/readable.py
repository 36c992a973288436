"""Leave out the images that cannot be read, and say which."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from qtdog.core.errors import DataError
from qtdog.core.files import write_atomic
from qtdog.core.progress import Progress
from qtdog.data.cache import cache_root
from qtdog.data.dataset import DomainDataset, map_samples
from qtdog.data.decode import HINT
from qtdog.data.index import SETTLED_NS
from qtdog.data.open_any import open_any
from qtdog.data.picked import PickedImages
from qtdog.data.text_domains import TextDomains


def open_readable(
    source: str, *, skip_unreadable: bool, min_domains: int = 2, progress: Progress = None
) -> DomainDataset:
    """Return the data set called `source` as a configuration with `data.skip_unreadable` takes it.

    Args:
        source: what a user types after `--data`.
        skip_unreadable: leave out the images that cannot be decoded.
        min_domains: refuse fewer domains.
        progress: of reading images.

    Raises:
        DataError: as in `data.open_any.open_any` and `without_unreadable`.
        RunError: the cache folder cannot be written.

    Example:
        >>> len(open_readable("rotated-digits", skip_unreadable=False))
        1797
    """
    dataset = open_any(source, min_domains=min_domains)
    return without_unreadable(dataset, progress) if skip_unreadable else dataset


def without_unreadable(dataset: DomainDataset, progress: Progress = None, folder: Path | None = None) -> DomainDataset:
    """Return the data set without the images that cannot be decoded; `skipped` of the result names them and why.

    Every image is decoded once; what was found is remembered by the data set's signature. A data set without any
    broken image is returned as it is, and so is one of texts.

    Args:
        dataset: the whole.
        progress: of reading images.
        folder: where to remember; default: the cache.

    Raises:
        DataError: no image can be read, or one is gone.
        RunError: the cache folder cannot be written.
    """
    if isinstance(dataset, TextDomains):
        return dataset
    skipped = _unreadable(dataset, progress, folder or cache_root())
    if not skipped:
        return dataset
    broken = {key for key, _ in skipped}
    places = np.flatnonzero([key not in broken for key in dataset.keys])
    if len(places) == 0:
        raise DataError(f"no image of {dataset.sheet.name} can be read; the first: {skipped[0][1]}")
    kept = PickedImages(dataset, places, list(range(len(dataset.domains))), dataset.sheet)
    kept.skipped = [*dataset.skipped, *skipped]
    return kept


def _unreadable(dataset: DomainDataset, progress: Progress, folder: Path) -> list[tuple[str, str]]:
    try:
        note = folder / "unreadable" / f"{dataset.signature()}.json"
    except DataError:  # a link to nowhere has no signature: then all are looked at each time
        note = None
    if note is not None and note.is_file():
        return [(str(key), str(reason)) for key, reason in json.loads(note.read_text())]
    reasons = map_samples(lambda i: _reason(dataset, i), len(dataset), progress)
    found = [(key, reason) for key, reason in zip(dataset.keys, reasons, strict=True) if reason]
    if note is not None and time.time_ns() - dataset.newest_change_ns() > SETTLED_NS:
        write_atomic(note, json.dumps(found))
    return found


def _reason(dataset: DomainDataset, i: int) -> str:
    try:
        dataset.read(i)
    except DataError as error:
        return str(error).removesuffix(HINT).rstrip()
    return ""
