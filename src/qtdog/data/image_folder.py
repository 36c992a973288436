"""A folder ROOT/DOMAIN/CLASS/image as a data set; no code or list of files needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError, nearest
from qtdog.data.cards import DatasetCard, match_card
from qtdog.data.dataset import DomainDataset, sample_arrays
from qtdog.data.decode import HINT, decode, decode_resized

CHUNK_BYTES = 1 << 16


class Record(NamedTuple):
    """One image: its domain and class, and its path relative to the data set's folder (with forward slashes)."""

    domain: str
    label: str
    key: str


class FileDataset(DomainDataset):
    """Image files below `root`, in the order of `records`.

    Args:
        card: the card.
        root: the folder that the keys are relative to.
        records: domain, class and relative path of each image.
        classes: class names if some may have no image; default: those in the records.
    """

    def __init__(
        self, card: DatasetCard, root: Path, records: list[Record], classes: tuple[str, ...] | None = None
    ) -> None:
        self.card = card
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
        return decode(self.path(i), self.card.channels)

    def read_resized(self, i: int, size: int) -> npt.NDArray[np.uint8]:
        """Return image i as uint8 (size, size, C), resized without cropping (DataError if unreadable)."""
        return decode_resized(self.path(i), size, self.card.channels)

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


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
LAYOUT = "ROOT/DOMAIN/CLASS/image"


def open_folder(root: Path, *, min_domains: int = 2) -> FileDataset:
    """Return the data set in a folder laid out as ROOT/DOMAIN/CLASS/image.

    Hidden files and files without an image suffix are ignored, folders below a class are searched, links are followed
    unless they lead back to a folder that they lie in.
    No image is opened. A folder with exactly the domains and classes of a known benchmark carries its card.

    Raises:
        DataError: the folder is missing, not a folder, not laid out like that, has a name that is not UTF-8, or has
            fewer domains than `min_domains`.
    """
    require_path(root, "data folder")
    if not root.is_dir():
        raise DataError(f"{root} is a file; give a folder laid out as {LAYOUT}, or a .csv or .jsonl manifest")
    classes, records = _scan(root)
    if not records:
        raise DataError(_explain_nothing_found(root))
    _require_images_everywhere(root, classes, records)
    _require_utf8([record.key for record in records], root)
    names = tuple(sorted({label for labels in classes.values() for label in labels}))
    own = DatasetCard(name=root.resolve().name, title=f"Images in the folder {root.resolve().name}")
    dataset = FileDataset(match_card(classes, names) or own, root, records, names)
    require_domains(dataset, min_domains, root)
    return dataset


def is_image_name(name: str) -> bool:
    """Return whether a file name has an image suffix and is not hidden.

    Example:
        >>> is_image_name("a.JPG"), is_image_name("._a.jpg"), is_image_name("notes.txt")
        (True, False, False)
    """
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def images_below(folder: Path) -> list[Path]:
    """Return all images below a folder, in torchvision's `ImageFolder` order: by folder, then by file name."""
    return [folder / name for name in names_below(folder)]


def names_below(folder: Path) -> list[str]:
    """Return the paths of all images below a folder, relative to it, with forward slashes, in the order of that.

    Strings, because half a million `Path` objects would take longer than everything else at the start.
    """
    found: list[str] = []
    base = len(str(folder)) + 1
    for top, names in sorted(_walk(folder)):
        prefix = f"{top[base:].replace(os.sep, '/')}/" if top[base:] else ""
        found += [prefix + name for name in sorted(names) if is_image_name(name)]
    return found


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder that is not hidden, and the names of its files; a link back up is not followed."""
    for top, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(top, name)]
        yield top, names


def _leads_back(top: str, name: str) -> bool:
    path = os.path.join(top, name)
    return os.path.islink(path) and Path(top).resolve().is_relative_to(os.path.realpath(path))


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden, nor what a Mac's archive leaves behind, sorted by name."""
    found = (entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(entry for entry in found if entry.name != "__MACOSX")


def _scan(root: Path) -> tuple[dict[str, list[str]], list[Record]]:
    classes: dict[str, list[str]] = {}
    records: list[Record] = []
    for domain in subfolders(root):
        labels = subfolders(domain)
        if labels:  # a folder without any is no domain: notes, lists of files
            classes[domain.name] = [label.name for label in labels]
        for label in labels:
            place = f"{domain.name}/{label.name}/"
            records += [Record(domain.name, label.name, place + name) for name in names_below(label)]
    return classes, records


def _explain_nothing_found(root: Path) -> str:
    layout = f"the layout must be {LAYOUT}"
    images_here = any(is_image_name(entry.name) for entry in root.iterdir())
    images_in = [folder.name for folder in subfolders(root) if any(map(is_image_name, os.listdir(folder)))]
    if images_here:
        return f"{root} has images but no domains: {layout}. Put them into folders, one per domain and class."
    if images_in:
        first = root / images_in[0]
        hint = f"If {root} is one domain with its classes, give the folder above it: {root.resolve().parent}"
        return f"{root} has no domains: images lie directly in {first}, but {layout}. {hint}"
    if subfolders(root):
        return f"{root} has folders but no images in them: {layout}; images end in {', '.join(IMAGE_SUFFIXES)}"
    return f"{root} has no domains, it is empty of folders: {layout}"


def _require_images_everywhere(root: Path, classes: dict[str, list[str]], records: list[Record]) -> None:
    empty = sorted(set(classes) - {record.domain for record in records})
    if empty:
        folders = ", ".join(str(root / name) for name in empty)
        raise DataError(f"no images in {folders}: fill or remove the folder (every folder of {root} is one domain)")


def _require_utf8(keys: list[str], root: Path) -> None:
    """Names of domains, classes and images are written into files and hashes."""
    try:
        "".join(keys).encode()
    except UnicodeEncodeError:
        shown = [key.encode(errors="surrogateescape").decode(errors="backslashreplace") for key in keys]
        wrong = next(name for name, key in zip(shown, keys, strict=True) if name != key)
        raise DataError(f"the name {root}/{wrong} is not UTF-8: rename it (\\x stands before an odd byte)") from None
