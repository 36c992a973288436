"""From what a user types after `--data` to a data set."""

from __future__ import annotations

import os
from pathlib import Path

from qtdog.core.errors import DataError, nearest
from qtdog.data.cards import CARDS, check_counts
from qtdog.data.dataset import DomainDataset
from qtdog.data.digits import RotatedDigits
from qtdog.data.files import require_path
from qtdog.data.folder import open_folder
from qtdog.data.manifest import SUFFIXES, open_manifest


def open_dataset(source: str, *, min_domains: int = 2) -> DomainDataset:
    """Return the data set called `source`: a name, a folder ROOT/DOMAIN/CLASS/image, or a .csv or .jsonl manifest.

    `rotated-digits` needs no files; other names are folders below $QTDOG_DATA.

    Example:
        >>> open_dataset("rotated-digits").domains
        ('0', '15', '30', '45', '60', '75')

    Raises:
        DataError: no such name or path (with the nearest match), or the data set is malformed.
    """
    if source == "rotated-digits":
        return RotatedDigits()
    if source in list(CARDS):
        return _open_benchmark(source, min_domains)
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return open_manifest(path, min_domains=min_domains)
    if not path.exists() and _looks_like_a_name(source):
        raise DataError(_explain_unknown(source))
    return open_folder(path, min_domains=min_domains)


def _looks_like_a_name(source: str) -> bool:
    return "/" not in source and os.sep not in source


def _explain_unknown(source: str) -> str:
    close = nearest(source, CARDS)
    hint = f"did you mean '{close}'? " if close else ""
    try:
        require_path(Path(source), "the path")
    except DataError as error:
        return f"'{source}' is not a known data set: {hint}Known: {', '.join(CARDS)}. As a folder: {error}"
    return f"'{source}' is not a known data set: {hint}Known: {', '.join(CARDS)}"


def _open_benchmark(name: str, min_domains: int) -> DomainDataset:
    base = os.environ.get("QTDOG_DATA")
    how = f"set QTDOG_DATA to the folder that holds '{name}', or give the folder itself: --data PATH/{name}"
    if not base:
        raise DataError(f"where is '{name}'? {how}")
    root = Path(base).expanduser() / name
    if not root.is_dir():
        raise DataError(f"QTDOG_DATA is {base}, but {root} is not a folder: {how}")
    dataset = open_folder(root, min_domains=min_domains)
    if dataset.sheet != CARDS[name]:
        dataset.sheet = CARDS[name]
        raise DataError(f"{root} is not {name}: {'; '.join(check_counts(dataset))}")
    return dataset
