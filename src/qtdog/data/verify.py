"""Read every image or text of a data set and list what is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from qtdog.core.errors import DataError
from qtdog.core.progress import Progress
from qtdog.data.cards import check_counts
from qtdog.data.dataset import (
    ID_TEST,
    ID_VAL,
    SPLIT_NAMES,
    TEST,
    TRAIN,
    VAL,
    DomainDataset,
    ImageDataset,
    map_samples,
    require_images,
)
from qtdog.data.decode import HINT
from qtdog.data.file_index import Changes, compare_hashes, files_below, hash_of, read_hashes
from qtdog.data.image_folder import FileDataset
from qtdog.data.splits import training_obstacles
from qtdog.data.text import TextDataset

MAX_LISTED = 20


@dataclass(frozen=True)
class Report:
    """What `verify` found; all lists are empty for a sound data set.

    Attributes:
        n_images: number of images.
        unreadable: (key, reason) of images that cannot be read.
        empty_classes: classes without any image.
        missing_classes: (domain, class) without an image, of classes that have some elsewhere.
        conflicting_labels: groups of keys with exactly the same content, in at least two classes.
        duplicates: groups of keys with exactly the same content, in at least two domains.
        copies: groups of keys with exactly the same content, all in one domain and one class.
        near_duplicates: groups of keys that look the same (`difference_hash`); empty unless they were asked for.
        obstacles: sentences on why the data set cannot be trained on.
        notes: sentences on what looks wrong: names that differ in case alone, files that were left out.
        differences: sentences on where the data set differs from its dataset card.
        changes: how its files differ from the list that was made when it was fetched or imported; None without a list.
        passed_over: which files are no images of the data set; "" if all are.
        n_passed_over: how many these are.
    """

    n_images: int
    unreadable: list[tuple[str, str]]
    empty_classes: list[str]
    missing_classes: list[tuple[str, str]]
    conflicting_labels: list[list[str]]
    duplicates: list[list[str]]
    copies: list[list[str]]
    near_duplicates: list[list[str]]
    obstacles: list[str]
    notes: list[str]
    differences: list[str]
    changes: Changes | None = None
    passed_over: str = ""
    n_passed_over: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(lines for _, lines in self._sections())

    def text(self) -> str:
        """Return the findings for people, at most 20 lines of a kind."""
        listed = "" if self.changes is None else "; files compared with the list of the fetch or import"
        head = f"{self.n_images:,} images: {self._verdict()}{listed}"
        sections = [_section(title, lines) for title, lines in self._sections() if lines]
        return "\n".join([head, *sections, *([self.passed_over] if self.passed_over else [])])

    def _verdict(self) -> str:
        if not self.ok:
            return "problems found"
        if not self.passed_over:
            return "nothing wrong"
        others = f"{self.n_passed_over:,} other files" if self.n_passed_over else "some folders"
        return f"nothing wrong with these, {others} passed over"

    def _sections(self) -> list[tuple[str, list[str]]]:
        changes = self.changes or Changes([], [], [])
        return [
            ("unreadable images (--skip-unreadable trains without them)", [reason for _, reason in self.unreadable]),
            ("what keeps it from being trained on", self.obstacles),
            ("classes without any image", self.empty_classes),
            ("classes missing from a domain", [f"{name} in {domain}" for domain, name in self.missing_classes]),
            ("the same image with two labels", _joined(self.conflicting_labels)),
            ("exact duplicates across domains", _joined(self.duplicates)),
            ("copies within a domain, of which one may be trained on and one held out", _joined(self.copies)),
            ("images that look the same", _joined(self.near_duplicates)),
            ("what looks wrong", self.notes),
            ("differences from the dataset card", self.differences),
            ("files of the list that are missing", changes.missing),
            ("files that differ from the list", changes.changed),
            ("files that are not in the list", changes.added),
        ]


def _joined(groups: list[list[str]]) -> list[str]:
    return [" = ".join(group) for group in groups]


def _section(title: str, lines: list[str]) -> str:
    more = [f"… and {len(lines) - MAX_LISTED:,} more"] if len(lines) > MAX_LISTED else []
    return "\n  ".join([f"{title}: {len(lines):,}", *lines[:MAX_LISTED], *more])


def verify(dataset: DomainDataset, progress: Progress = None, *, near: bool = False) -> Report:
    """Return what is wrong with a data set, after reading every image once.

    Args:
        dataset: the images.
        progress: of reading them.
        near: list images that look the same as well, which the content alone does not show.

    Example:
        >>> from qtdog.data.known_datasets import RotatedDigits
        >>> verify(RotatedDigits()).ok
        True
    """
    images = require_images(dataset)
    found = map_samples(lambda i: _examine(images, i, near), len(dataset), progress)
    contents = [image.content for image in found]
    empty = {dataset.classes[c] for c in np.flatnonzero(dataset.counts().sum(axis=0) == 0)}
    passed, same = dataset.passed_over, _groups(contents)
    domains, classes = dataset.domain_index, dataset.class_index
    conflicting = [group for group in same if len(set(classes[group])) > 1]
    across = [group for group in same if len(set(domains[group])) > 1]
    alike = _similar([image.look for image in found]) if near else []
    return Report(
        n_images=len(dataset),
        unreadable=[(dataset.keys[i], image.reason) for i, image in enumerate(found) if image.reason],
        empty_classes=sorted(empty),
        missing_classes=[(domain, name) for domain, name in dataset.missing_classes() if name not in empty],
        conflicting_labels=_keys(dataset, conflicting),
        duplicates=_keys(dataset, across),
        copies=_keys(dataset, [group for group in same if group not in conflicting and group not in across]),
        near_duplicates=_keys(dataset, [group for group in alike if len({contents[i] for i in group}) > 1]),
        obstacles=training_obstacles(dataset),
        notes=[*dataset.notes, *(passed.problems() if passed else ())],
        differences=check_counts(dataset),
        changes=_changes(dataset, contents),
        passed_over=passed.summary() if passed else "",
        n_passed_over=passed.n_files if passed else 0,
    )


class _Examined(NamedTuple):
    """Content hash ("" if there is none), why the image cannot be read ("" if it can), and how it looks (if asked)."""

    content: str
    reason: str
    look: str


def _examine(dataset: ImageDataset, i: int, near: bool) -> _Examined:
    content = ""
    try:
        content = dataset.sample_sha256(i)
        pixels = dataset.read(i)
    except DataError as error:
        return _Examined(content, str(error).removesuffix(HINT).rstrip(), "")
    return _Examined(content, "", difference_hash(pixels) if near else "")


def difference_hash(pixels: npt.NDArray[np.uint8], size: int = 16) -> str:
    """Return a hash of how an image looks: whether each of size x size grey patches is brighter than its neighbor.

    Images that differ in size, format or compression alone have hashes that differ in few bits, if in any. An image of
    one color has no look: "".

    Args:
        pixels: uint8 (H, W, C).
        size: patches in each direction.

    Example:
        >>> ramp = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
        >>> difference_hash(ramp) == difference_hash(ramp + 50), difference_hash(ramp) == difference_hash(ramp[:, ::-1])
        (True, False)
    """
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("L")
    patches = np.asarray(image.resize((size + 1, size), Image.Resampling.BILINEAR)).astype(np.int16)
    brighter = patches[:, 1:] > patches[:, :-1]
    return np.packbits(brighter).tobytes().hex() if brighter.any() else ""


def _groups(values: list[str]) -> list[list[int]]:
    """The positions of equal values that are not "", where there are at least two."""
    same: dict[str, list[int]] = defaultdict(list)
    for i, value in enumerate(values):
        if value:
            same[value].append(i)
    return [group for group in same.values() if len(group) > 1]


MAX_BITS = 10
BAND_BITS = 23


def _similar(looks: list[str]) -> list[list[int]]:
    """The positions of hashes that differ in at most 10 of 256 bits: at least one of 11 bands of bits is then equal."""
    numbers = {i: int(look, 16) for i, look in enumerate(looks) if look}
    group = {i: i for i in numbers}  # the smallest position of its group
    for start in range(0, 256, BAND_BITS):
        bands: dict[int, list[int]] = defaultdict(list)
        for i, number in numbers.items():
            bands[number >> start & ((1 << BAND_BITS) - 1)].append(i)
        for members in bands.values():
            first = members[0]
            for i in members[1:]:
                if group[i] != group[first] and (numbers[i] ^ numbers[first]).bit_count() <= MAX_BITS:
                    old, new = sorted((group[i], group[first]), reverse=True)
                    group.update({j: new for j, root in group.items() if root == old})
    return _groups([str(group.get(i, "")) for i in range(len(looks))])


def _keys(dataset: DomainDataset, groups: list[list[int]]) -> list[list[str]]:
    return [[dataset.keys[i] for i in group] for group in groups]


def _changes(dataset: DomainDataset, contents: list[str]) -> Changes | None:
    """Compare the files with their list; the images' hashes are known already."""
    root = getattr(dataset, "root", None)
    listed = None if root is None else read_hashes(root)
    if root is None or listed is None:
        return None
    known = dict(zip(dataset.keys, contents, strict=True)) if isinstance(dataset, FileDataset) else {}
    return compare_hashes(
        listed, ((key, known[key] if key in known else hash_of(root / key)) for key in files_below(root))
    )


@dataclass(frozen=True)
class TextReport:
    """What `verify_texts` found.

    Attributes:
        n_texts: number of texts.
        n_domains: number of domains (reviewers).
        parts: texts and domains of each part of the official division.
        empty: texts without a letter.
        differences: sentences on where the data set differs from its card or its own division.
        changes: how its files differ from their list; None without a list.
    """

    n_texts: int
    n_domains: int
    parts: dict[str, tuple[int, int]]
    empty: int
    differences: list[str]
    changes: Changes | None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; texts without a letter are only reported."""
        changes = self.changes or Changes([], [], [])
        return not any((self.differences, changes.missing, changes.changed, changes.added))

    def text(self) -> str:
        """Return the findings for people."""
        head = f"{self.n_texts:,} texts of {self.n_domains:,} domains, {self.empty:,} of them empty: "
        lines = [f"{part}: {n:,} texts of {domains:,} domains" for part, (n, domains) in self.parts.items()]
        changes = self.changes or Changes([], [], [])
        lines += self.differences
        for what in ("missing", "changed", "added"):
            lines += [f"{what}: {path}" for path in getattr(changes, what)[:20]]
        return "\n  ".join([head + ("nothing wrong" if self.ok else "problems found"), *lines])


def verify_texts(dataset: TextDataset, root: Path | None = None) -> TextReport:
    """Return what is wrong with a data set of texts, after reading each once.

    Args:
        dataset: the texts.
        root: its folder, whose files are compared with their list.

    Raises:
        DataError: the list of its files is damaged.
    """
    listed = None if root is None else read_hashes(root)
    changes = None
    if root is not None and listed is not None:
        changes = compare_hashes(listed, ((key, hash_of(root / key)) for key in files_below(root)))
    where = {part: dataset.indices(part) for part in SPLIT_NAMES}
    return TextReport(
        n_texts=len(dataset),
        n_domains=len(dataset.domains),
        parts={part: (len(rows), len(np.unique(dataset.domain_index[rows]))) for part, rows in where.items()},
        empty=sum(not dataset.text(i).strip() for i in range(len(dataset))),
        differences=check_counts(dataset) + _overlaps(dataset),
        changes=changes,
    )


def _overlaps(dataset: TextDataset) -> list[str]:
    """A domain of an unseen part that is in another part as well would make the test too easy."""
    seen = np.unique(dataset.domain_index[np.isin(dataset.official_split, (TRAIN, ID_VAL, ID_TEST))])
    unseen = {part: dataset.domain_index[dataset.official_split == part] for part in (VAL, TEST)}
    shared = {SPLIT_NAMES[part]: np.unique(domains) for part, domains in unseen.items()}
    return [
        f"{len(both):,} domains of {part} are also in the parts that are trained on, such as {dataset.domains[both[0]]}"
        for part, own in shared.items()
        if len(both := np.intersect1d(own, seen))
    ]
