"""Images on disk as a data set: a folder ROOT/DOMAIN/CLASS/image, or a manifest, a table that names them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError, nearest
from qtdog.data.cards import DatasetCard, card_for
from qtdog.data.dataset import (
    ImageDataset,
    Resize,
    check_domain_names,
    composed,
    is_missing,
    look_alikes,
    sample_arrays,
)
from qtdog.data.decode import HINT, FileGoneError, decode, decode_bytes, decode_resized, read_file, to_square
from qtdog.data.scan import IMAGE_SUFFIXES, PassedOver, is_image, is_image_name, list_folder, names_below, subfolders

CHUNK_BYTES = 1 << 16


class ImageFile(NamedTuple):
    """One image: its domain and class, and its path relative to the data set's folder (with forward slashes)."""

    domain: str
    label: str
    key: str


class ImageFiles(NamedTuple):
    """Many images, in columns: half a million tuples would take as much memory as their paths."""

    domains: list[str]
    labels: list[str]
    keys: list[str]

    @classmethod
    def of(cls, images: Iterable[ImageFile]) -> ImageFiles:
        """Return images as columns.

        Example:
            >>> ImageFiles.of([ImageFile("night", "cat", "1.png"), ImageFile("night", "dog", "2.png")])
            ImageFiles(domains=['night', 'night'], labels=['cat', 'dog'], keys=['1.png', '2.png'])
        """
        columns = cls([], [], [])
        for image in images:
            for column, value in zip(columns, image, strict=True):
                column.append(value)
        return columns


class FileDataset(ImageDataset):
    """Image files below `root`, in the order given.

    Args:
        card: the card.
        root: the folder that the keys are relative to.
        images: domain, class and relative path of each.
        classes: class names if some may have no image; default: those of the images.
    """

    def __init__(
        self, card: DatasetCard, root: Path, images: ImageFiles, classes: tuple[str, ...] | None = None
    ) -> None:
        self.card = card
        self.root = root
        self._resolved = root.resolve()
        self.domains = tuple(sorted(set(images.domains)))
        self.classes = classes or tuple(sorted(set(images.labels)))
        check_domain_names(card.name, self.domains)
        self.notes = [*look_alikes("domains", self.domains), *look_alikes("classes", self.classes)]
        self.keys = images.keys
        self.domain_index, self.class_index = sample_arrays(self.domains, self.classes, images.domains, images.labels)

    def path(self, i: int) -> Path:
        """Return the path of image i."""
        return self.root / self.keys[i]

    def files(self) -> tuple[str, list[str]]:
        """Return the folder, with links resolved, and the path of each image in it."""
        return str(self._resolved), self.keys

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i, uint8 (H, W, C) (DataError if it cannot be read)."""
        return decode(self.path(i), self.card.channels)

    def read_resized(self, i: int, size: int) -> npt.NDArray[np.uint8]:
        """Return image i as uint8 (size, size, C), resized without cropping (DataError if unreadable)."""
        return decode_resized(self.path(i), size, self.card.channels)

    def read_hashed(self, i: int, size: int, resize: Resize = to_square) -> tuple[npt.NDArray[np.uint8], str]:
        """Return image i, resized, and the hex sha256 of the bytes that it was decoded from."""
        content = read_file(self.path(i))
        pixels = decode_bytes(content, str(self.path(i)), self.card.channels, size)
        return resize(pixels, size), hashlib.sha256(content).hexdigest()

    def sample_signature(self, i: int) -> str:
        """Return the folder of the data set, and size, times, inode and device of file i, which is not read."""
        stat = self._stat(i)
        identity = f"{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}\0{stat.st_dev}"
        return f"{self._resolved}\0{identity}"

    def sample_change_ns(self, i: int) -> int:
        """Return the change time (ctime) of file i, ns since 1970."""
        return self._stat(i).st_ctime_ns

    def sample_sha256(self, i: int) -> str:
        """Return the sha256 of file i's bytes (DataError if it cannot be read)."""
        try:
            return _sha256(f"{self._resolved}/{self.keys[i]}")
        except OSError as error:
            raise _unreadable(self.path(i), error) from error

    def _stat(self, i: int) -> os.stat_result:
        try:
            return os.stat(self.path(i))
        except OSError as error:
            raise _unreadable(self.path(i), error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    kind = FileGoneError if isinstance(error, FileNotFoundError) else DataError
    return kind(f"{path} cannot be read: {error.strerror}. {HINT}")


def _sha256(path: str) -> str:
    """Hash one file; a small one, as images are, in an eighth of the time that `hashlib.file_digest` takes.

    It is opened without waiting: a pipe that nobody writes to gives no bytes, and is refused when it is decoded.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        digest = hashlib.sha256()
        while chunk := os.read(handle, CHUNK_BYTES):
            digest.update(chunk)
    finally:
        os.close(handle)
    return digest.hexdigest()


def require_domains(dataset: ImageDataset, min_domains: int, where: Path) -> None:
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
    hint = f"; did you mean {parent / close}?" if close else f"; look in {parent.resolve()}"
    raise DataError(f"{what} {path} does not exist{hint}")


LAYOUT = "ROOT/DOMAIN/CLASS/image"
SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "crossval", "test", "testing", "full", "all")
"""Names of folders that hold the parts of a split in other programs; in lower case."""


def open_folder(root: Path, *, min_domains: int = 2) -> FileDataset:
    """Return the data set in a folder laid out as ROOT/DOMAIN/CLASS/image.

    Folders below a class are searched, links are followed unless they lead back to a folder that they lie in. Hidden
    files are ignored, other files that are no images are counted in `passed_over`, and what looks wrong is said in
    `notes`. No image is opened, but the first bytes of a file without a suffix are read. Names that are equal in
    Unicode's composed form (NFC) are one. A folder with exactly the domains and classes of a known benchmark carries
    its card.

    Raises:
        DataError: the folder is missing, not a folder, unreadable, not laid out like that, has a name that is not
            UTF-8, a domain or class is a link to nowhere, or there are fewer domains than `min_domains`.
    """
    require_path(root, "data folder")
    if not root.is_dir():
        raise DataError(f"{root} is a file; give a folder laid out as {LAYOUT}, or a .csv or .jsonl manifest")
    passed = PassedOver()
    classes, images = _scan(root, passed)
    if not images.keys:
        raise DataError(_explain_nothing_found(root))
    _require_images_everywhere(root, classes, images)
    _require_utf8([f"{domain}/{label}" for domain, labels in classes.items() for label in labels], root)
    _require_utf8(images.keys, root)
    _refuse_split_folders(root, images)
    names = tuple(sorted({label for labels in classes.values() for label in labels}))
    own = DatasetCard(name=root.resolve().name, title=f"Images in the folder {root.resolve().name}")
    level = _level_notes(root, classes, images)
    try:
        dataset = FileDataset(own, root, images, names)
        require_domains(dataset, min_domains, root)
    except DataError as error:
        raise DataError(". ".join([str(error), *level])) from None
    dataset.card = card_for(dataset)
    dataset.passed_over = passed
    dataset.notes = [*dataset.notes, *level]
    return dataset


def _scan(root: Path, passed: PassedOver) -> tuple[dict[str, list[str]], ImageFiles]:
    classes: dict[str, list[str]] = {}
    found: list[tuple[str, str, list[str]]] = []  # domain, class, paths
    for domain in _folders(str(root), passed):
        labels = _folders(f"{root}/{domain}", passed)
        name = composed(domain)
        if labels:  # a folder without any is no domain: notes, lists of files
            classes.setdefault(name, []).extend(map(composed, labels))
        for label in labels:
            place = f"{domain}/{label}/"
            below = [place + image for image in names_below(f"{root}/{domain}/{label}", passed)]
            found.append((name, composed(label), below))
    if not all(map(str.isascii, {label for labels in classes.values() for label in labels} | set(classes))):
        found.sort(key=itemgetter(0, 1))  # names of different Unicode forms come together
    images = ImageFiles([], [], [])
    for name, label, keys in found:
        images.domains.extend([name] * len(keys))
        images.labels.extend([label] * len(keys))
        images.keys.extend(keys)
    return classes, images


def _folders(folder: str, passed: PassedOver) -> list[str]:
    """The folders at the level of domains or of classes, where no file belongs and no link may be broken."""
    here = PassedOver()
    listing = list_folder(folder, here)
    if here.links:
        raise DataError(_explain_link(here.links[0]))
    passed.junk += here.junk
    passed.special += here.special
    for name in listing.files:
        path = f"{folder}/{name}"
        passed.misplaced.append(path) if is_image(folder, name) else passed.add_file(path)
    return listing.folders


def _explain_link(path: str) -> str:
    text = f"{path} is a link to {os.readlink(path)}, which does not exist"
    return f"{text}: a whole domain or class would be missing. Mount the disk, or remove the link."


def _refuse_split_folders(root: Path, images: ImageFiles) -> None:
    """DOMAIN/SPLIT/CLASS/image (Dassl, JiGen): the parts of a split would become classes."""
    labels = set(images.labels)
    if not (all(label.lower() in SPLIT_FOLDERS for label in labels) and _all_lie_deeper(images)):
        return
    found = ", ".join(sorted(labels))
    raise DataError(
        f"{root} is laid out as DOMAIN/SPLIT/CLASS/image (the folders {found} are no classes), but the layout must be "
        f"{LAYOUT}. 'qtdog data import {root} -o NEW' joins the parts in a new folder of links; "
        "for a known benchmark, add --as NAME."
    )


def _all_lie_deeper(images: ImageFiles) -> bool:
    return all(key.count("/") > 2 for key in images.keys)


def _common_depth(images: ImageFiles) -> int:
    """How many folders all images lie in before the ways part, but two levels are left: at least 1."""
    if len(set(images.domains)) > 1:
        return 1
    common = len(os.path.commonpath(images.keys).split("/"))
    return max(1, min(common, min(key.count("/") for key in images.keys) - 2))


def _level_notes(root: Path, classes: Iterable[str], images: ImageFiles) -> list[str]:
    """Say what suggests that the folder is a level too high, or that its domains are the parts of a split."""
    notes = []
    if {domain.lower() for domain in classes} <= set(SPLIT_FOLDERS):
        names = ", ".join(sorted(classes))
        notes.append(f"the domains {names} look like the parts of a split, not like domains: the layout is {LAYOUT}")
    if _all_lie_deeper(images):
        depth = _common_depth(images)
        below: dict[str, set[str]] = {}
        for key in images.keys:
            *place, name, _ = key.split("/", depth + 2)
            below.setdefault(name, set()).add("/".join(place))
        repeated = sorted(name for name, places in below.items() if len(places) > 1)
        if repeated and len(repeated) == len(below):
            first = root.joinpath(*images.keys[0].split("/")[:depth])
            text = f"no image lies directly in a class folder, and the folders {', '.join(repeated[:5])} repeat in them"
            notes.append(f"{text}: if these are the classes, give the folder below, such as {first}")
    return notes


def _explain_nothing_found(root: Path) -> str:
    layout = f"the layout must be {LAYOUT}"
    names = list_folder(str(root)).files
    images_in = [folder.name for folder in subfolders(root) if any(map(is_image_name, os.listdir(folder)))]
    if any(map(is_image_name, names)):
        return f"{root} has images but no domains: {layout}. Put them into folders, one per domain and class."
    if images_in:
        first = root / images_in[0]
        hint = f"If {root} is one domain with its classes, give the folder above it: {root.resolve().parent}"
        return f"{root} has no domains: images lie directly in {first}, but {layout}. {hint}"
    if subfolders(root):
        return f"{root} has folders but no images in them: {layout}; images end in {', '.join(IMAGE_SUFFIXES)}"
    return f"{root} has no domains, it is empty of folders: {layout}"


def _require_images_everywhere(root: Path, classes: dict[str, list[str]], images: ImageFiles) -> None:
    empty = sorted(set(classes) - set(images.domains))
    if empty:
        folders = ", ".join(str(root / name) for name in empty)
        raise DataError(f"no images in {folders}: fill or remove the folder (every folder of {root} is one domain)")


def _require_utf8(keys: list[str], root: Path) -> None:
    """Names of domains, classes and images are written into files and hashes."""
    if all(map(str.isascii, keys)):
        return
    try:
        "".join(keys).encode()
    except UnicodeEncodeError:
        shown = [key.encode(errors="surrogateescape").decode(errors="backslashreplace") for key in keys]
        wrong = next(name for name, key in zip(shown, keys, strict=True) if name != key)
        raise DataError(f"the name {root}/{wrong} is not UTF-8: rename it (\\x stands before an odd byte)") from None


DOMAIN = "domain"
SUFFIXES = (".csv", ".jsonl")
MULTI_LABEL = (
    "several classes for one image (multi-label) are not supported. "
    "Give each image one class, or train one model per class"
)


def open_manifest(path: Path, *, min_domains: int = 2, domain_column: str = DOMAIN) -> FileDataset:
    """Return the data set that a manifest lists.

    A `.csv` file has a header line with the columns path, class (or label) and domain; a `.jsonl` file has one object
    with these keys per line. Any other column can hold the domains (site, camera, month). Paths are relative to the
    manifest's folder and may not leave it.

    Args:
        path: the manifest.
        min_domains: fewest domains.
        domain_column: the column whose values are the domains.

    Raises:
        DataError: the manifest is missing or malformed, a listed file does not exist (the text gives the line), a path
            is listed twice or leaves the folder, an image has several classes, a line has more cells than there are
            columns, or there are fewer domains than `min_domains`.
    """
    require_path(path, "manifest")
    root = path.parent
    records: dict[str, ImageFile] = {}
    both = False
    for line, row in _rows(path, domain_column.strip().lower()):
        record = _record(row, f"{path}, line {line}")
        both = both or ("class" in row and "label" in row)
        if record.key in records:
            raise DataError(f"{path}, line {line}: {_twice(records[record.key], record)}")
        if not (root / record.key).is_file():
            raise DataError(f"{path}, line {line}: {_missing(root, record.key)}")
        records[record.key] = record
    if not records:
        raise DataError(f"{path} lists no images: one line per image with path, class, {domain_column}")
    _refuse_joined_classes(path, {record.label for record in records.values()})
    ordered = ImageFiles.of(sorted(records.values()))
    dataset = FileDataset(DatasetCard(name=path.stem, title=f"Images listed in {path.name}"), root, ordered)
    dataset.card = card_for(dataset)
    if both:
        dataset.notes = [*dataset.notes, "there are the columns 'class' and 'label': the classes are those of 'class'"]
    require_domains(dataset, min_domains, path)
    return dataset


def _rows(path: Path, domain: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and values of each row; the domain is under its own name, whatever the column is called."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = (
                _csv_rows(path, stream, domain) if path.suffix.lower() == ".csv" else _json_rows(path, stream, domain)
            )
            yield from ((line, row | {DOMAIN: row[domain]}) for line, row in rows)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is no list of lines with commas: {error}") from error


def _csv_rows(path: Path, stream: Iterator[str] | Any, domain: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(stream, skipinitialspace=True)
    names = [(name or "").strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = names
    _require_columns(names, domain, f"{path}, line 1", " (the first line names the columns, with commas between)")
    for row in reader:
        spare = row.pop(None, ())
        if any(cell.strip() for cell in spare):  # a comma too many moves all that is behind it
            text = f"has {len(names) + len(spare)} cells, but there are {len(names)} columns"
            raise DataError(f'{path}, line {reader.line_num} {text}: put a text with a comma in quotes, "like, this"')
        yield reader.line_num, row


def _json_rows(path: Path, stream: Iterator[str], domain: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {line} must be an object like {{"path": …, "class": …, "domain": …}}')
        named = {name.strip().lower(): value for name, value in row.items()}
        _require_columns(list(named), domain, f"{path}, line {line}")
        yield line, named


def _require_columns(names: list[str], domain: str, where: str, advice: str = "") -> None:
    for column in ("path", "class", "label", domain):
        if names.count(column) > 1:
            raise DataError(f"{where}: there are {names.count(column)} columns '{column}'; rename or remove one")
    for column in ("path", "class", domain):
        accepted = ("class", "label") if column == "class" else (column,)
        if any(name in names for name in accepted):
            continue
        others = [name for name in names if name not in ("path", "class", "label", domain)]
        close = nearest(column, others)
        hint = f"; rename '{close}'?" if close else "."
        if column == domain and others:
            hint += (
                f" Another column can hold the domains: --data '{where.partition(', line')[0]}:{close or others[0]}'."
            )
        raise DataError(f"{where}: the column '{column}' is missing{hint} Found: {', '.join(names) or 'none'}{advice}")


def _missing(root: Path, key: str) -> str:
    if (root / key).is_dir():
        return f"{root / key} is a folder; list each image"
    text = f"{root / key} does not exist (paths are relative to {root})"
    return f"{text}; between folders goes a /" if "\\" in key else text


def _twice(first: ImageFile, second: ImageFile) -> str:
    if first.label == second.label:
        domains = "" if first.domain == second.domain else f", in the domains '{first.domain}' and '{second.domain}'"
        return f"{second.key} is listed twice{domains}; an image has one line"
    return f"{second.key} is listed with class '{first.label}' and class '{second.label}': {MULTI_LABEL}"


def _refuse_joined_classes(path: Path, labels: set[str]) -> None:
    """A cell like "cat|dog", whose parts are classes of other images, means two classes."""
    for label in sorted(labels):
        for separator in ("|", ";", ","):
            parts = [part.strip() for part in label.split(separator)]
            if len(parts) > 1 and any(part in labels for part in parts):
                raise DataError(f"{path}: the class '{label}' looks like {len(parts)} classes: {MULTI_LABEL}")


def _record(row: dict[str, Any], where: str) -> ImageFile:
    label = row["class"] if "class" in row else row["label"]
    if isinstance(label, (list, dict)):
        raise DataError(f"{where}: the class is a list: {MULTI_LABEL}")
    values = {"path": row["path"], "class": label, DOMAIN: row[DOMAIN]}
    for column, value in values.items():
        if isinstance(value, (list, dict)):
            raise DataError(f"{where}: '{column}' is a list; give one text")
        if value is None or not str(value).strip():
            raise DataError(f"{where}: '{column}' is empty")
        if column != "path" and is_missing(str(value).strip()):
            hint = "if it is a name, call it otherwise" if isinstance(value, str) else "leave the image out"
            raise DataError(f"{where}: '{column}' is {value}, which means that there is none; {hint}")
    key = str(row["path"]).strip()
    if Path(key).is_absolute() or PureWindowsPath(key).drive or ".." in Path(key).parts:
        text = f"path '{key}' is absolute or leaves the manifest's folder"
        raise DataError(f"{where}: {text}; give paths relative to it, without '..'")
    return ImageFile(composed(str(values[DOMAIN]).strip()), composed(str(label).strip()), Path(key).as_posix())
