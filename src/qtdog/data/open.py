"""From what a user types after `--data` to a data set."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from qtdog.core.errors import DataError, nearest
from qtdog.data.camelyon17 import open_camelyon17
from qtdog.data.cards import CARDS, check_counts
from qtdog.data.dataset import DomainDataset
from qtdog.data.digits import RotatedDigits
from qtdog.data.files import FileDataset, require_domains, require_path
from qtdog.data.folder import open_folder
from qtdog.data.hashes import NOTES
from qtdog.data.home import data_home
from qtdog.data.manifest import SUFFIXES, open_manifest
from qtdog.data.mnist import MnistDataset
from qtdog.data.reviews import open_reviews
from qtdog.data.sheet import Datasheet
from qtdog.data.text import TextDataset

COLUMN = re.compile(r"(?P<path>.+\.(?:csv|jsonl)):(?P<column>[^:/\\]+)", re.IGNORECASE)

OPENERS: dict[str, Callable[[Path, Datasheet], DomainDataset]] = {
    "camelyon17": open_camelyon17,
    "colored-mnist": lambda root, sheet: MnistDataset(sheet, root),
    "rotated-mnist": lambda root, sheet: MnistDataset(sheet, root),
}


def open_dataset(source: str, *, min_domains: int = 2) -> DomainDataset:
    """Return the data set called `source`: a name, a folder ROOT/DOMAIN/CLASS/image, or a .csv or .jsonl manifest.

    `rotated-digits` needs no files; other names are folders below the data home (`data.home.data_home`). A manifest
    may be followed by the column that holds the domains: `scans.csv:month`.

    Example:
        >>> open_dataset("rotated-digits").domains
        ('0', '15', '30', '45', '60', '75')

    Raises:
        DataError: no such name or path (with the nearest match), the data set is malformed, or it is one of texts.
    """
    if source == "rotated-digits":
        return RotatedDigits()
    if source in list(CARDS):
        return _open_benchmark(source, locate(source), min_domains)
    if is_text(source):
        raise DataError(f"{source} is a data set of texts, and images are wanted here")
    match = COLUMN.fullmatch(source)
    path = Path(match["path"] if match else source).expanduser()
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return open_manifest(path, min_domains=min_domains, domain_column=match["column"] if match else "domain")
    if not path.exists() and _looks_like_a_name(source):
        raise DataError(_explain_unknown(source))
    name = adopted_name(path)
    if name and CARDS[name].kind in OPENERS:
        return _open_benchmark(name, path, min_domains)
    dataset = open_folder(path, min_domains=min_domains)
    dataset.sheet = CARDS[name] if name else dataset.sheet
    return dataset


def open_texts(source: str) -> TextDataset:
    """Return the data set of texts called `source`: `amazon-reviews`, or its folder.

    Raises:
        DataError: no such name or folder, or it is malformed.
    """
    sheet = CARDS["amazon-reviews"]
    return open_reviews(locate(source) if source == sheet.name else Path(source).expanduser(), sheet)


def is_text(source: str) -> bool:
    """Return whether what a user types after `--data` means a data set of texts.

    Example:
        >>> is_text("amazon-reviews"), is_text("pacs")
        (True, False)
    """
    path = Path(source).expanduser()
    return source == "amazon-reviews" or (path / "reviews.csv").is_file()


def locate(name: str) -> Path:
    """Return the folder of a data set that is known by name (DataError if it is not there, with how to get it)."""
    root = data_home() / name
    if root.is_dir():
        return root
    getting = f"qtdog data fetch {name}" if CARDS[name].archives else f"qtdog data import FOLDER --as {name}"
    how = f"get it with '{getting}', set QTDOG_DATA to the folder that holds '{name}', or give its folder: --data PATH"
    base = os.environ.get("QTDOG_DATA")
    if base:
        raise DataError(f"QTDOG_DATA is {base}, but {root} is not a folder: {how}")
    raise DataError(f"where is '{name}'? It is not in {root.parent}: {how}")


def adopted_name(root: Path) -> str:
    """Return the name of the data set that was fetched or imported into a folder, or "" if nothing says it."""
    try:
        name = str(json.loads((root / NOTES / "origin.json").read_text(encoding="utf-8"))["dataset"])
    except (OSError, ValueError, KeyError, TypeError):
        name = ""
    if name in list(CARDS):
        return name
    return "camelyon17" if (root / "metadata.csv").is_file() and (root / "patches").is_dir() else ""


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


def _open_benchmark(name: str, root: Path, min_domains: int) -> DomainDataset:
    sheet = CARDS[name]
    if sheet.kind == "reviews":
        raise DataError(f"{name} is a data set of texts, and images are wanted here")
    if sheet.kind in OPENERS:
        dataset = OPENERS[sheet.kind](root, sheet)
        require_domains(dataset, min_domains, root)
        return dataset
    dataset = open_folder(root, min_domains=min_domains)
    return _named(dataset, sheet, root)


def _named(dataset: FileDataset, sheet: Datasheet, root: Path) -> FileDataset:
    """The data set with the card that was asked for, if its domains and classes are those of the card."""
    dataset.sheet = sheet
    if (dataset.domains, dataset.classes) != (sheet.domains, sheet.classes):
        raise DataError(f"{root} is not {sheet.name}: {'; '.join(check_counts(dataset))}")
    return dataset
