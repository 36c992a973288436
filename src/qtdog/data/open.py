"""From what a user types after `--data` to a data set of images or of texts, without unreadable images if asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qtdog.core.errors import DataError, nearest
from qtdog.core.files import write_atomic
from qtdog.core.progress import Progress
from qtdog.core.registry import Registry
from qtdog.data.cards import CARDS, DatasetCard, check_counts, data_root
from qtdog.data.dataset import DomainDataset, ImageDataset, ImageSubset, map_samples
from qtdog.data.decode import HINT, DecodeError, FileGoneError, decoder
from qtdog.data.decoded_cache import cache_root
from qtdog.data.file_index import NOTES, SETTLED_NS
from qtdog.data.image_folder import SUFFIXES, FileDataset, open_folder, open_manifest, require_domains, require_path
from qtdog.data.known_datasets import MnistDataset, RotatedDigits, open_camelyon17, open_reviews
from qtdog.data.text import TextDataset, TextDomains

COLUMN = re.compile(r"(?P<path>.+\.(?:csv|jsonl)):(?P<column>[^:/\\]+)", re.IGNORECASE)

OPENERS: dict[str, Callable[[Path, DatasetCard], ImageDataset]] = {
    "camelyon17": open_camelyon17,
    "colored-mnist": lambda root, card: MnistDataset(card, root),
    "rotated-mnist": lambda root, card: MnistDataset(card, root),
}


IN_PYTHON = "python:"  # begins data.source of a data set that was made in Python
# Data sets of plug-ins, by name.
OWN_DATASETS: Registry[Callable[[], DomainDataset]] = Registry("data set of a plug-in")


def open_dataset(source: str, *, min_domains: int = 2) -> DomainDataset:
    """Return the data set called `source`: a name, a folder ROOT/DOMAIN/CLASS/image, or a .csv or .jsonl manifest.

    `rotated-digits` needs no files; other names are folders below the data home (`data.cards.data_root`). A manifest
    may be followed by the column that holds the domains: `scans.csv:month`.

    Example:
        >>> open_dataset("rotated-digits").domains
        ('0', '15', '30', '45', '60', '75')

    Raises:
        DataError: no such name or path (with the nearest match), the data set is malformed, or it is one of texts.
    """
    if source == "rotated-digits":
        return RotatedDigits()
    if source in list(OWN_DATASETS) or source.startswith(IN_PYTHON):
        return _open_own(source)
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
    dataset.card = CARDS[name] if name else dataset.card
    return dataset


def _open_own(source: str) -> DomainDataset:
    if source.startswith(IN_PYTHON):
        name = source.removeprefix(IN_PYTHON)
        raise DataError(f"{name} was made in Python, and can be opened only there: give the data set itself")
    return OWN_DATASETS[source]()


def open_texts(source: str) -> TextDataset:
    """Return the data set of texts called `source`: `amazon-reviews`, or its folder.

    Raises:
        DataError: no such name or folder, or it is malformed.
    """
    card = CARDS["amazon-reviews"]
    return open_reviews(locate(source) if source == card.name else Path(source).expanduser(), card)


def is_text(source: str) -> bool:
    """Return whether what a user types after `--data` means a data set of texts.

    Example:
        >>> is_text("amazon-reviews"), is_text("pacs")
        (True, False)
    """
    path = Path(source).expanduser()
    return source == "amazon-reviews" or ((path / "reviews.csv").is_file() and (path / "splits").is_dir())


def locate(name: str) -> Path:
    """Return the folder of a data set that is known by name (DataError if it is not there, with how to get it)."""
    root = data_root() / name
    if root.is_dir():
        return root
    getting = f"qtdog data fetch {name}" if CARDS[name].archives else f"qtdog data import FOLDER --as {name}"
    hint = f"get it with '{getting}', set QTDOG_DATA to the folder that holds '{name}', or give its folder: --data PATH"
    base = os.environ.get("QTDOG_DATA")
    if base:
        raise DataError(f"QTDOG_DATA is {base}, but {root} is not a folder: {hint}")
    raise DataError(f"where is '{name}'? It is not in {root.parent}: {hint}")


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
    names = [*CARDS, *OWN_DATASETS]
    parts = [name for name in names if source in name.split("-")]  # "digits" is a word of two
    close = parts or [name for name in [nearest(source, names)] if name]
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    try:
        require_path(Path(source), "the path")
    except DataError as error:
        return f"'{source}' is not a known data set: {hint}Known: {', '.join(names)}. As a folder: {error}"
    return f"'{source}' is not a known data set: {hint}Known: {', '.join(names)}"


def _open_benchmark(name: str, root: Path, min_domains: int) -> ImageDataset:
    card = CARDS[name]
    if card.kind == "reviews":
        raise DataError(f"{name} is a data set of texts, and images are wanted here")
    if card.kind in OPENERS:
        dataset = OPENERS[card.kind](root, card)
        require_domains(dataset, min_domains, root)
        return dataset
    dataset = open_folder(root, min_domains=min_domains)
    return _named(dataset, card, root)


def _named(dataset: FileDataset, card: DatasetCard, root: Path) -> FileDataset:
    """The data set with the card that was asked for, if its domains and classes are those of the card."""
    dataset.card = card
    if (dataset.domains, dataset.classes) != (card.domains, card.classes):
        raise DataError(f"{root} is not {card.name}: {'; '.join(check_counts(dataset))}")
    return dataset


def open_any(source: str, *, min_domains: int = 2) -> DomainDataset:
    """Return the data set called `source`, of images (`data.open.open_dataset`) or of texts.

    Raises:
        DataError: as in `open_dataset` and `open_texts`.

    Example:
        >>> len(open_any("rotated-digits"))
        1797
    """
    return TextDomains(open_texts(source)) if is_text(source) else open_dataset(source, min_domains=min_domains)


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
        DataError: as in `data.open.open_any` and `without_unreadable`.
        RunError: the cache folder cannot be written.

    Example:
        >>> len(open_readable("rotated-digits", skip_unreadable=False))
        1797
    """
    dataset = open_any(source, min_domains=min_domains)
    return without_unreadable(dataset, progress) if skip_unreadable else dataset


@contextlib.contextmanager
def recorded_source(source: str, *, is_recorded: bool = True) -> Iterator[None]:
    """Within it, an error about data that are no longer where a run recorded them says how to give their new place.

    Args:
        source: what a run recorded, or what a user gave.
        is_recorded: whether a run did.

    Raises:
        DataError: the one that was raised within, with that hint if nothing lies at `source`.

    Example:
        >>> with recorded_source("/gone/photos"):
        ...     open_dataset("/gone/photos")
        Traceback (most recent call last):
        ...
        qtdog.core.errors.DataError: ... A run recorded this place: if the data moved, --data tells where it is.
    """
    try:
        yield
    except DataError as error:
        match = COLUMN.fullmatch(source)
        if not is_recorded or source in list(CARDS) or Path(match["path"] if match else source).expanduser().exists():
            raise
        text = f"{str(error).rstrip('.')}. A run recorded this place: if the data moved, --data tells where it is."
        raise DataError(text) from error


def without_unreadable(
    dataset: DomainDataset,
    progress: Progress = None,
    folder: Path | None = None,
    *,
    settled_ns: int = SETTLED_NS,
) -> DomainDataset:
    """Return the data set without the images that cannot be decoded; `skipped` of the result names them and why.

    Every image is decoded once; what was found is remembered by the data set's signature and the decoder's
    version. A data set without any broken image is returned as it is, and so is one of texts.

    Args:
        dataset: the whole.
        progress: of reading images.
        folder: where to remember; default: the cache.
        settled_ns: nothing is remembered of files changed within so many ns, which may change again unseen.

    Raises:
        DataError: no image can be read, or the machine failed to read one.
        RunError: the cache folder cannot be written.
    """
    if not isinstance(dataset, ImageDataset):
        return dataset
    skipped = _unreadable(dataset, progress, folder or cache_root(), settled_ns)
    if not skipped:
        return dataset
    broken = {key for key, _ in skipped}
    places = np.flatnonzero([key not in broken for key in dataset.keys])
    if len(places) == 0:
        raise DataError(f"no image of {dataset.card.name} can be read; the first: {skipped[0][1]}")
    kept = ImageSubset(dataset, places, list(range(len(dataset.domains))), dataset.card)
    kept.skipped = [*dataset.skipped, *skipped]
    return kept


def _unreadable(dataset: ImageDataset, progress: Progress, folder: Path, settled_ns: int) -> list[tuple[str, str]]:
    try:
        note = folder / "unreadable" / f"{dataset.signature()}-{decoder()}.json"
    except FileGoneError:  # a link to nowhere has no signature: then all are looked at each time
        note = None
    if note is not None and note.is_file():
        return [(str(key), str(reason)) for key, reason in json.loads(note.read_text())]
    reasons = map_samples(lambda i: why_unreadable(dataset, i), len(dataset), progress)
    found = [(key, reason) for key, reason in zip(dataset.keys, reasons, strict=True) if reason]
    if note is not None and time.time_ns() - dataset.newest_change_ns() > settled_ns:
        write_atomic(note, json.dumps(found))
    return found


def why_unreadable(dataset: ImageDataset, i: int) -> str:
    """Return why the content of image i cannot be decoded, or that it is gone; "" if it can be decoded.

    Raises:
        DataError: the machine failed to read it (a disk error, too many open files, no memory), which says nothing of
            the image.
    """
    try:
        dataset.read(i)
    except (DecodeError, FileGoneError) as error:
        return str(error).removesuffix(HINT).rstrip()
    return ""
