"""What lies in a data folder: its images in a fixed order, and every file that is passed over, counted."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from qtdog.core.errors import DataError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".heic", ".heif"),
)
_SUFFIXES = frozenset(IMAGE_SUFFIXES)
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
"""Of JPEG, PNG, GIF, BMP and TIFF: tells that a file whose name has no suffix is an image."""
RAW = (".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2")
FILMS = (".mp4", ".avi", ".mov", ".mkv")
UNREAD_SUFFIXES = frozenset(
    (
        *RAW,
        *FILMS,
        ".psd",
        ".svg",
        ".eps",
        ".exr",
        ".hdr",
        ".jxl",
        ".dcm",
        ".nii",
        ".tga",
        ".ico",
        ".npy",
        ".zip",
        ".tar",
    )
)
"""Files that probably hold images, which are not read."""
JUNK_FOLDERS = frozenset(
    (
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin"),
        *("system volume information", "__macosx", "lost+found", "__pycache__"),
    )
)
"""What a NAS, a Mac, Windows, a notebook or an image viewer leaves behind; in lower case."""
JUNK_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini"))
MAX_SUFFIXES = 8
MAX_LOOKS = 20
"""Files of an unknown suffix are opened to see if they are images, until so many of that suffix were none."""


@dataclass
class PassedOver:
    """Files below a data folder that are no images of the data set; hidden ones (.name) are not counted.

    Attributes:
        suffixes: suffix → number of files that do not count as images; "" is none.
        examples: suffix → one of their paths.
        disguised: suffix → number of those whose content begins like an image.
        misplaced: images outside of ROOT/DOMAIN/CLASS.
        links: links that lead nowhere.
        special: pipes, sockets and devices.
        junk: name → number of folders of that name, whose content is not looked at.
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    disguised: Counter[str] = field(default_factory=Counter)
    misplaced: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    junk: Counter[str] = field(default_factory=Counter)

    @property
    def n_files(self) -> int:
        """Number of files that are passed over."""
        return self.suffixes.total() + len(self.misplaced) + len(self.links) + len(self.special)

    def add_file(self, path: str) -> None:
        """Count a file that is no image."""
        suffix = os.path.splitext(path)[1].lower()
        n_others = self.suffixes[suffix] - self.disguised[suffix]
        self.suffixes[suffix] += 1
        if suffix and n_others < MAX_LOOKS and _holds_an_image(path):
            if not self.disguised[suffix]:
                self.examples[suffix] = path
            self.disguised[suffix] += 1
        self.examples.setdefault(suffix, path)

    def problems(self) -> list[str]:
        """Return one sentence for each kind of file that was probably meant to be part of the data set."""
        found = []
        if self.misplaced:
            text = "lie outside of a class folder and are left out, such as"
            found.append(f"{len(self.misplaced):,} images {text} {self.misplaced[0]}: the layout is DOMAIN/CLASS/image")
        if self.links:
            found.append(f"{len(self.links):,} links lead nowhere, such as {self.links[0]}: is a disk not mounted?")
        if self.special:
            found.append(f"{len(self.special):,} pipes, sockets or devices are left out, such as {self.special[0]}")
        for suffix in sorted(UNREAD_SUFFIXES & set(self.suffixes)):
            example = self.examples[suffix]
            found.append(
                f"{self.suffixes[suffix]:,} files {suffix} are left out, such as {example}: store them as JPEG or PNG"
            )
        for suffix, n in sorted(self.disguised.items()):
            if suffix not in UNREAD_SUFFIXES:
                text = "hold images and are left out for their name, such as"
                found.append(f"{n:,} files {suffix} {text} {self.examples[suffix]}: give them an image's suffix")
        return found

    def summary(self) -> str:
        """Return how many files of which suffix, and which folders, are passed over; "" if none is."""
        common = self.suffixes.most_common()
        parts = [f"{n:,} {suffix or 'without a suffix'} (such as {self.examples[suffix]})" for suffix, n in common]
        if len(parts) > MAX_SUFFIXES:
            rest = sum(n for _, n in common[MAX_SUFFIXES:])
            parts = [*parts[:MAX_SUFFIXES], f"{rest:,} of other kinds"]
        parts += [f"{n:,} folders {name}" for name, n in sorted(self.junk.items())]
        return f"passed over: {', '.join(parts)}" if parts else ""


@dataclass
class Listing:
    """What lies in one folder, hidden and junk left out: names, sorted.

    Attributes:
        folders: names of folders.
        files: names of files.
        others: those of them that have no image's suffix, or are links.
    """

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    def add_other(self, name: str) -> None:
        """Add a file that may be no image."""
        self.files.append(name)
        self.others.add(name)


def list_folder(folder: str, passed: PassedOver | None = None) -> Listing:
    """Return the folders and regular files in a folder; links are followed unless they lead back up.

    Args:
        folder: the folder.
        passed: where to count what is neither; default: nowhere.

    Raises:
        DataError: the folder cannot be read.
    """
    listing, passed = Listing(), passed or PassedOver()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if _has_image_suffix(name) and entry.is_file(follow_symlinks=False):  # nearly all of half a million
                    listing.files.append(name)
                else:
                    _sort_in(entry, folder, listing, passed)
    except OSError as error:
        raise DataError(f"the folder {error.filename or folder} cannot be read: {error.strerror}") from error
    listing.folders.sort()
    listing.files.sort()
    return listing


def _sort_in(entry: os.DirEntry[str], folder: str, listing: Listing, passed: PassedOver) -> None:
    if _is_broken_link(entry):
        # one that is named like an image counts as one: training names it, and may leave it out if asked
        listing.add_other(entry.name) if is_image_name(entry.name) else passed.links.append(entry.path)
    elif entry.is_dir():
        if entry.name.lower() in JUNK_FOLDERS:
            passed.junk[entry.name] += 1
        elif not _leads_back(folder, entry):
            listing.folders.append(entry.name)
    elif entry.is_file():
        if entry.name.lower() not in JUNK_FILES:
            listing.add_other(entry.name)
    else:
        passed.special.append(entry.path)


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return False
    try:
        entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise
        return True
    return False


def _leads_back(folder: str, entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and Path(folder).resolve().is_relative_to(os.path.realpath(entry.path))


def names_below(folder: Path | str, passed: PassedOver | None = None) -> list[str]:
    """Return the paths of all images below a folder, relative to it, with forward slashes.

    The order is that of torchvision's `ImageFolder`: by folder, then by file name. They are strings, because half a
    million `Path` objects would take longer than everything else at the start.

    Raises:
        DataError: a folder cannot be read.
    """
    base = str(folder)
    passed = passed or PassedOver()
    found: list[tuple[str, list[str]]] = []
    left = [base]
    while left:
        top = left.pop()
        listing = list_folder(top, passed)
        left += [os.path.join(top, name) for name in listing.folders]
        images = []
        for name in listing.files:
            if name not in listing.others or is_image(top, name):
                images.append(name)
            else:
                passed.add_file(os.path.join(top, name))
        found.append((top, images))
    names: list[str] = []
    for top, images in sorted(found):
        prefix = f"{top[len(base) + 1 :].replace(os.sep, '/')}/" if len(top) > len(base) else ""
        names += [prefix + name for name in images]
    return names


def images_below(folder: Path, passed: PassedOver | None = None) -> list[Path]:
    """Return all images below a folder in the order of `names_below` (DataError if a folder cannot be read)."""
    return [folder / name for name in names_below(folder, passed)]


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name; hidden ones and junk are left out (DataError if unreadable)."""
    return [folder / name for name in list_folder(str(folder)).folders]


def is_image_name(name: str) -> bool:
    """Return whether a file name has an image suffix and is not hidden.

    Example:
        >>> is_image_name("a.JPG"), is_image_name("._a.jpg"), is_image_name("notes.txt")
        (True, False, False)
    """
    return _has_image_suffix(name) and not name.startswith(".")


def _has_image_suffix(name: str) -> bool:
    return name[name.rfind(".") :].lower() in _SUFFIXES


def is_image(folder: str, name: str) -> bool:
    """Return whether a file counts as an image: by its suffix, or by its first bytes if it has none."""
    return is_image_name(name) or ("." not in name and _begins_like_an_image(os.path.join(folder, name)))


def _holds_an_image(path: str) -> bool:
    """Return whether a file of an unknown suffix begins like an image; one that cannot be read is none."""
    try:
        return _begins_like_an_image(path)
    except DataError:
        return False


def _begins_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as stream:
            start = stream.read(16)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    in_a_box = start[4:12] in (b"ftypavif", b"ftypheic", b"ftypheix", b"ftypmif1", b"jP  \r\n\x87\n")
    return start.startswith(BEGINNINGS) or in_a_box or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
