"""Read every image or text of a data set and list what is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtdog.core.errors import DataError
from qtdog.core.progress import Progress
from qtdog.data.cards import check_counts
from qtdog.data.dataset import ID_TEST, ID_VAL, SPLIT_NAMES, TEST, TRAIN, VAL, DomainDataset, map_samples
from qtdog.data.decode import HINT
from qtdog.data.file_index import Changes, compare, files_below, hash_of, read_hashes
from qtdog.data.image_folder import FileDataset
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
        duplicates: groups of keys with exactly the same content, in at least two domains.
        differences: sentences on where the data set differs from its card.
        changes: how its files differ from the list that was made when it was fetched or imported; None without a list.
    """

    n_images: int
    unreadable: list[tuple[str, str]]
    empty_classes: list[str]
    missing_classes: list[tuple[str, str]]
    duplicates: list[list[str]]
    differences: list[str]
    changes: Changes | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(lines for _, lines in self._sections())

    def text(self) -> str:
        """Return the findings for people, at most 20 lines of a kind."""
        listed = "" if self.changes is None else "; files compared with the list of the fetch or import"
        head = f"{self.n_images:,} images: " + ("nothing wrong" if self.ok else "problems found") + listed
        return "\n".join([head, *(_section(title, lines) for title, lines in self._sections() if lines)])

    def _sections(self) -> list[tuple[str, list[str]]]:
        changes = self.changes or Changes([], [], [])
        return [
            ("unreadable images (--skip-unreadable trains without them)", [reason for _, reason in self.unreadable]),
            ("classes without any image", self.empty_classes),
            ("classes missing from a domain", [f"{name} in {domain}" for domain, name in self.missing_classes]),
            ("exact duplicates across domains", [" = ".join(group) for group in self.duplicates]),
            ("differences from the dataset card", self.differences),
            ("files of the list that are missing", changes.missing),
            ("files that differ from the list", changes.changed),
            ("files that are not in the list", changes.added),
        ]


def _section(title: str, lines: list[str]) -> str:
    more = [f"… and {len(lines) - MAX_LISTED:,} more"] if len(lines) > MAX_LISTED else []
    return "\n  ".join([f"{title}: {len(lines):,}", *lines[:MAX_LISTED], *more])


def verify(dataset: DomainDataset, progress: Progress = None) -> Report:
    """Return what is wrong with a data set, after reading every image once.

    Example:
        >>> from qtdog.data.digits import RotatedDigits
        >>> verify(RotatedDigits()).ok
        True
    """
    found = map_samples(lambda i: _examine(dataset, i), len(dataset), progress)
    empty = {dataset.classes[c] for c in np.flatnonzero(dataset.counts().sum(axis=0) == 0)}
    return Report(
        n_images=len(dataset),
        unreadable=[(dataset.keys[i], reason) for i, (_, reason) in enumerate(found) if reason],
        empty_classes=sorted(empty),
        missing_classes=[(domain, name) for domain, name in dataset.missing_classes() if name not in empty],
        duplicates=_across_domains(dataset, [content for content, _ in found]),
        differences=check_counts(dataset),
        changes=_changes(dataset, [content for content, _ in found]),
    )


def _changes(dataset: DomainDataset, contents: list[str]) -> Changes | None:
    """Compare the files with their list; the images' hashes are known already."""
    root = getattr(dataset, "root", None)
    listed = None if root is None else read_hashes(root)
    if root is None or listed is None:
        return None
    known = dict(zip(dataset.keys, contents, strict=True)) if isinstance(dataset, FileDataset) else {}
    return compare(listed, ((key, known[key] if key in known else hash_of(root / key)) for key in files_below(root)))


def _examine(dataset: DomainDataset, i: int) -> tuple[str, str]:
    """Content hash ("" if there is none) and the reason why the image cannot be read ("" if it can)."""
    content = ""
    try:
        content = dataset.sample_sha256(i)
        dataset.read(i)
    except DataError as error:
        return content, str(error).removesuffix(HINT).rstrip()
    return content, ""


def _across_domains(dataset: DomainDataset, contents: list[str]) -> list[list[str]]:
    same: dict[str, list[int]] = defaultdict(list)
    for i, content in enumerate(contents):
        if content:
            same[content].append(i)
    groups = [group for group in same.values() if len({int(dataset.domain_index[i]) for i in group}) > 1]
    return [[dataset.keys[i] for i in group] for group in groups]


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
        """Whether nothing is wrong; texts without a letter are only told."""
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
        changes = compare(listed, ((key, hash_of(root / key)) for key in files_below(root)))
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
