"""What is wrong with a data set of texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtdog.data.cards import check_counts
from qtdog.data.hashes import Changes, compare, files_below, hash_of, read_hashes
from qtdog.data.parts import ID_TEST, ID_VAL, PARTS, TEST, TRAIN, VAL
from qtdog.data.text import TextDataset


@dataclass(frozen=True)
class TextReport:
    """What `verify_texts` found.

    Attributes:
        n_texts: number of texts.
        n_domains: number of domains (reviewers).
        parts: texts and domains of each part of the official division.
        empty: texts without a letter.
        differences: sentences on where the data set differs from its datasheet or its own division.
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
    where = {part: dataset.indices(part) for part in PARTS}
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
    seen = np.unique(dataset.domain_index[np.isin(dataset.parts, (TRAIN, ID_VAL, ID_TEST))])
    shared = {PARTS[part]: np.unique(dataset.domain_index[dataset.parts == part]) for part in (VAL, TEST)}
    return [
        f"{len(both):,} domains of {part} are also in the parts that are trained on, such as {dataset.domains[both[0]]}"
        for part, own in shared.items()
        if len(both := np.intersect1d(own, seen))
    ]
