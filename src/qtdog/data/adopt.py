"""Make a folder of a known data set, in the one layout that the rest reads, from files that somebody laid out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from qtdog.core.errors import DataError
from qtdog.core.files import atomic_folder
from qtdog.core.progress import Progress
from qtdog.data.hashes import files_below, write_hashes
from qtdog.data.layouts import Layout, Placed, find_layout
from qtdog.data.mnist import find_mnist
from qtdog.data.sheet import Datasheet

How = Literal["link", "copy", "move"]
MARKERS = {"camelyon17": ("metadata.csv", "patches"), "reviews": ("reviews.csv", "splits")}


def adopt(
    source: Path, target: Path, sheet: Datasheet, how: How, origin: dict[str, Any], *, progress: Progress = None
) -> str:
    """Put the data set that lies somewhere below `source` into the new folder `target`; return the layout, in words.

    The folder appears when it is whole, with the list of its files and their hashes (`data.hashes`).

    Args:
        source: the folder that is searched.
        target: the new folder.
        sheet: which data set it is.
        how: "link" (a hard link on the same disk, else a symbolic one), "copy", or "move" (`source` is dropped later).
        origin: is written into the new folder.
        progress: of placing and then of hashing the files.

    Raises:
        DataError: the data set is not there, `target` is not empty, or a file cannot be read.
        RunError: the disk is full.
    """
    require_new(target)
    layout = _layout(source, sheet)
    with atomic_folder(target) as temporary:
        _place(layout.images, temporary, PLACERS[how], progress)
        write_hashes(temporary, origin | {"layout": layout.name}, progress)
        target.rmdir() if target.is_dir() else None  # an empty one would be kept instead of ours
    return layout.name


def require_new(target: Path) -> None:
    """Raise DataError unless a folder can be made at `target`: nothing or an empty folder is there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        text = f"{target} is there already: check it with 'qtdog data verify {target}'"
        raise DataError(f"{text}, give another folder (--to), or remove it")


def _layout(source: Path, sheet: Datasheet) -> Layout:
    if not source.is_dir():
        raise DataError(f"{source} is no folder")
    if sheet.kind in ("colored-mnist", "rotated-mnist"):
        return Layout("MNIST's four files", [Placed(path, path.name) for path in find_mnist(source)])
    if sheet.kind in MARKERS:
        root = _find_marked(source, sheet, MARKERS[sheet.kind])
        return Layout("WILDS", [Placed(root / key, key) for key in files_below(root)])
    return find_layout(source, sheet)


def _find_marked(source: Path, sheet: Datasheet, markers: Iterable[str]) -> Path:
    for top, folders, _ in os.walk(source):
        if all(Path(top, name).exists() for name in markers):
            return Path(top)
        folders[:] = [name for name in folders if not name.startswith((".", "patient_"))]
    raise DataError(f"{source} is no copy of {sheet.name}: no folder in it has {' and '.join(markers)}")


def _place(images: list[Placed], folder: Path, put: Callable[[Path, Path], object], progress: Progress) -> None:
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
