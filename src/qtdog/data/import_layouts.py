"""Layouts in which known data sets are handed around, and the import into the one layout that the rest reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qtdog.core.errors import DataError
from qtdog.core.files import atomic_folder
from qtdog.core.progress import Progress
from qtdog.data.cards import DatasetCard
from qtdog.data.dataset import composed
from qtdog.data.file_index import files_below, write_hashes
from qtdog.data.image_folder import SPLIT_FOLDERS
from qtdog.data.known_datasets import find_mnist
from qtdog.data.scan import PassedOver, images_below, is_image, list_folder, subfolders

MAX_DEPTH = 3
MAX_LIST_BYTES = 2 << 30


class ImagePlace(NamedTuple):
    """One image of somebody's folder: where it lies, and where it belongs (DOMAIN/CLASS/image)."""

    path: Path
    key: str


class FolderLayout(NamedTuple):
    """What was found in a folder: how it is laid out, in words, and its images in the order of their keys."""

    name: str
    images: list[ImagePlace]


def find_layout(folder: Path, card: DatasetCard, passed: PassedOver | None = None) -> FolderLayout:
    """Return the images of a data set of folders that lie somewhere below `folder`; `passed` counts the other files.

    Raises:
        DataError: the domains are not there, a class is unknown, or a listed image is missing.
    """
    if card.kind == "camera-traps" and (lists := _annotation_lists(folder)):
        return FolderLayout("Caltech camera traps with annotations", _ordered(_camera_traps(folder, lists, card)))
    root, domains = _find_domains(folder, card)
    lists = _image_lists(folder)
    if card.kind == "listed-folders" and lists:
        return FolderLayout("the authors' lists (TLlib)", _ordered(_listed(domains, lists, card)))
    splits = any(part.name.lower() in SPLIT_FOLDERS for part in subfolders(next(iter(domains.values()))))
    name = "DOMAIN/SPLIT/CLASS/image (Dassl)" if splits else "DOMAIN/CLASS/image (DomainBed, TLlib)"
    passed = passed or PassedOver()
    found = [image for domain, path in domains.items() for image in _domain(path, domain, card, passed)]
    if not found:
        raise DataError(f"{root} has the domains of {card.name}, but no images in them")
    return FolderLayout(name, _ordered(found))


NO_CARD = DatasetCard("own", "a folder of which nothing is known")


def _own_layout(folder: Path, passed: PassedOver) -> FolderLayout:
    """The images of a folder DOMAIN/SPLIT/CLASS/image of which nothing else is known, or DOMAIN/CLASS/image."""
    found = []
    for name in _folders(folder, passed):
        found += _domain(folder / name, composed(name), NO_CARD, passed, exact=True)
    if not found:
        raise DataError(f"{folder} has no images in folders DOMAIN/SPLIT/CLASS or DOMAIN/CLASS")
    return FolderLayout("DOMAIN/SPLIT/CLASS/image", _ordered(found))


def _folders(folder: Path, passed: PassedOver) -> list[str]:
    """The folders in one above those of the classes, where no image belongs."""
    listing = list_folder(str(folder), passed)
    for name in listing.files:
        path = str(folder / name)
        passed.misplaced.append(path) if is_image(str(folder), name) else passed.add_file(path)
    return listing.folders


def _ordered(images: list[ImagePlace]) -> list[ImagePlace]:
    return sorted(images, key=lambda image: image.key)


def _fold(name: str) -> str:
    """A name without case, blanks and punctuation: "Real World", "real_world" and "Real_World" are one."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _names(own: tuple[str, ...] | None, aliases: Mapping[str, str]) -> dict[str, str]:
    return {_fold(alias): name for alias, name in aliases.items()} | {_fold(name): name for name in own or ()}


def _find_domains(folder: Path, card: DatasetCard) -> tuple[Path, dict[str, Path]]:
    """The folder in which the domains lie, breadth first, and the folder of each."""
    known = _names(card.domains, card.domain_aliases)
    best: dict[str, Path] = {}
    for candidate in _levels(folder):
        found = {known[_fold(path.name)]: path for path in subfolders(candidate) if _fold(path.name) in known}
        if len(found) == len(card.domains or ()):
            return candidate, found
        best = max(best, found, key=len)
    missing = sorted(set(card.domains or ()) - set(best))
    text = f"{folder} is no copy of {card.name}: no folder in it has the domains {', '.join(card.domains or ())}"
    raise DataError(text + (f" (missing: {', '.join(missing)})" if best else "") + ".")


def _levels(folder: Path) -> Iterator[Path]:
    level = [folder]
    for _ in range(MAX_DEPTH + 1):
        yield from level
        level = [below for path in level for below in subfolders(path)[:100]]


def _holders(path: Path) -> list[Path]:
    """The folders in which the classes of one domain lie: the parts of a split if there are any."""
    parts = {part.name.lower(): part for part in subfolders(path) if part.name.lower() in SPLIT_FOLDERS}
    whole = parts.get("full") or parts.get("all")
    return [whole] if whole else list(parts.values()) or [path]


def _domain(
    path: Path, domain: str, card: DatasetCard, passed: PassedOver, *, exact: bool = False
) -> Iterator[ImagePlace]:
    """Yield the images of one domain; parts of a division are joined, and equal names in them kept apart."""
    taken: set[str] = set()
    holders = _holders(path)
    if holders != [path]:
        _folders(path, passed)
    for holder in holders:
        for image in _classes(holder, domain, card, passed, exact=exact):
            key = image.key
            while key in taken:
                folder, _, name = key.rpartition("/")
                key = f"{folder}/{holder.name}_{name}"
            taken.add(key)
            yield ImagePlace(image.path, key)


def _classes(holder: Path, domain: str, card: DatasetCard, passed: PassedOver, *, exact: bool) -> Iterator[ImagePlace]:
    """Yield the images of one part; classes have the names of the card, or (`exact`) those of the folders."""
    known = {} if exact else _names(card.classes, card.class_aliases)
    for folder in (holder / name for name in _folders(holder, passed)):
        label = composed(folder.name) if exact else known.get(_fold(folder.name))
        if label is None:
            raise DataError(f"{folder} is no class of {card.name}; they are {', '.join((card.classes or ())[:20])}")
        for path in images_below(folder, passed):
            name = path.relative_to(folder).as_posix().replace("/", "_")
            yield ImagePlace(path, f"{domain}/{label}/{name}")


def _image_lists(folder: Path) -> list[Path]:
    lists = [path for place in [folder, *_levels(folder)] for path in sorted(place.glob("*.txt"))]
    return [path for path in dict.fromkeys(lists) if "/" in _first_line(path)]


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as stream:
        words = stream.readline(4096).split()
    return words[0] if len(words) >= 2 and words[-1].isdigit() else ""


def _listed(domains: Mapping[str, Path], lists: list[Path], card: DatasetCard) -> list[ImagePlace]:
    """The images that the lists name (lines "DOMAIN/CLASS/image label"); the label is not needed."""
    known = _names(card.domains, card.domain_aliases), _names(card.classes, card.class_aliases)
    images: dict[str, ImagePlace] = {}
    missing: list[str] = []
    for line in (line for path in lists for line in _read(path).splitlines() if line.strip()):
        domain, label, name = line.rsplit(maxsplit=1)[0].split("/")[-3:]
        if _fold(domain) not in known[0] or _fold(label) not in known[1]:
            raise DataError(f"the lists of {card.name} name {domain}/{label}, which is no domain and class of it")
        path = domains[known[0][_fold(domain)]] / label / name
        key = f"{known[0][_fold(domain)]}/{known[1][_fold(label)]}/{name}"
        if path.is_file():
            images[key] = ImagePlace(path, key)
        else:
            missing.append(str(path))
    if missing:
        raise DataError(f"{len(missing):,} listed images are missing, the first is {missing[0]}")
    return list(images.values())


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_LIST_BYTES:
        raise DataError(f"{path} is too large for a list: {path.stat().st_size:,} bytes")
    return path.read_text(encoding="utf-8", errors="replace")


def _annotation_lists(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json") if "annotation" in path.name or "caltech_images" in path.name)


def _camera_traps(folder: Path, lists: list[Path], card: DatasetCard) -> list[ImagePlace]:
    """The images at the four places with one of the ten classes; an image with two classes is in both, as published."""
    labels = _names(card.classes, card.class_aliases)
    files = {name: Path(top, name) for top, _, names in os.walk(folder) for name in names}
    found: dict[str, ImagePlace] = {}
    for tree in map(_annotations, lists):
        categories = {item["id"]: item["name"] for item in tree["categories"]}
        places = {item["id"]: (f"location_{item['location']}", item["file_name"]) for item in tree["images"]}
        for annotation in tree["annotations"]:
            domain, name = places.get(annotation["image_id"], ("", ""))
            label = labels.get(_fold(categories[annotation["category_id"]]))
            if domain not in (card.domains or ()) or label is None:
                continue
            if name not in files:
                raise DataError(f"{folder}: the image {name}, which the annotations name, is missing")
            key = f"{domain}/{label}/{name}"
            found[key] = ImagePlace(files[name], key)
    return list(found.values())


def _annotations(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(_read(path))
        if all(isinstance(tree[key], list) for key in ("categories", "images", "annotations")):
            return tree
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a list of annotations: {error}") from error
    raise DataError(f"{path} is not a list of annotations")


How = Literal["link", "copy", "move"]
MARKERS = {"camelyon17": ("metadata.csv", "patches"), "reviews": ("reviews.csv", "splits")}


def adopt(
    source: Path,
    target: Path,
    card: DatasetCard,
    how: How,
    origin: dict[str, Any],
    *,
    progress: Progress = None,
    passed: PassedOver | None = None,
) -> str:
    """Put the data set that lies somewhere below `source` into the new folder `target`; return the layout, in words.

    The folder appears when it is whole, with the list of its files and their hashes (`data.file_index`).

    Args:
        source: the folder that is searched.
        target: the new folder.
        card: which data set it is.
        how: "link" (a hard link on the same disk, else a symbolic one), "copy", or "move" (`source` is dropped later).
        origin: is written into the new folder.
        progress: of placing and then of hashing the files.
        passed: where to count the files that are no images; default: nowhere.

    Raises:
        DataError: the data set is not there, `target` is not empty, or a file cannot be read.
        RunError: the disk is full.
    """
    require_new(target)
    layout = _layout(source, card, passed or PassedOver())
    _require_inside(layout.images, source)
    with atomic_folder(target) as temporary:
        _place(layout.images, temporary, PLACERS[how], progress)
        write_hashes(temporary, origin | {"layout": layout.name}, progress)
        target.rmdir() if target.is_dir() else None  # an empty one would be kept instead of ours
    return layout.name


def require_new(target: Path) -> None:
    """Raise DataError unless a folder can be made at `target`: nothing or an empty folder is there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        text = f"{target} is there already: check it with 'qtdog data verify {target}'"
        raise DataError(f"{text}, give another folder (--output), or remove it")


def _layout(source: Path, card: DatasetCard, passed: PassedOver) -> FolderLayout:
    if not source.is_dir():
        raise DataError(f"{source} is no folder")
    if card.kind in ("colored-mnist", "rotated-mnist"):
        return FolderLayout("MNIST's four files", [ImagePlace(path, path.name) for path in find_mnist(source)])
    if card.kind in MARKERS:
        root = _find_marked(source, card, MARKERS[card.kind])
        return FolderLayout("WILDS", [ImagePlace(root / key, key) for key in files_below(root)])
    return _own_layout(source, passed) if card.domains is None else find_layout(source, card, passed)


def _find_marked(source: Path, card: DatasetCard, markers: Iterable[str]) -> Path:
    for top, folders, _ in os.walk(source):
        if all(Path(top, name).exists() for name in markers):
            return Path(top)
        folders[:] = [name for name in folders if not name.startswith((".", "patient_"))]
    raise DataError(f"{source} is no copy of {card.name}: no folder in it has {' and '.join(markers)}")


def _require_inside(images: Iterable[ImagePlace], source: Path) -> None:
    """Raise DataError if an image is a link that leads out of the folder: a received one may link to any file here."""
    root = os.path.realpath(source)
    folders: dict[str, str] = {}
    for image in images:
        above, name = os.path.split(image.path)
        if above not in folders:
            folders[above] = os.path.realpath(above)
        place = os.path.join(folders[above], name)
        place = os.path.realpath(place) if os.path.islink(place) else place
        if not place.startswith(os.path.join(root, "")):
            raise DataError(
                f"{image.path} leads out of {source}, to {place}: import the folder that it lies in, or copy it there"
            )


def _place(images: list[ImagePlace], folder: Path, put: Callable[[Path, Path], object], progress: Progress) -> None:
    made: set[Path] = set()
    for done, image in enumerate(images, start=1):
        target = folder / image.key
        if target.parent not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(target.parent)
        put(image.path, target)
        if progress is not None and (done % 100 == 0 or done == len(images)):
            progress(done, len(images))


def _link(source: Path, target: Path) -> None:
    resolved = source.resolve()
    try:
        os.link(resolved, target)
    except OSError:  # on another disk, or one without hard links
        target.symlink_to(resolved)


def _move(source: Path, target: Path) -> None:
    try:  # not a rename: an image with two classes goes to two places
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


PLACERS: dict[How, Callable[[Path, Path], object]] = {"link": _link, "copy": shutil.copyfile, "move": _move}
