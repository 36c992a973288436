"""The contract of a data set of texts that each belong to one domain (such as its author) and one class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError
from qtdog.data.parts import PARTS
from qtdog.data.sheet import Datasheet


class TextDataset:
    """Texts in a fixed order; how they become numbers is the model's affair.

    They are held as one UTF-8 block, which takes a third of the memory of as many strings.

    Args:
        sheet: the datasheet.
        texts: the texts.
        labels: class name of each.
        groups: domain of each (a reviewer, a site).
        parts: position in `PARTS` of each, the official division.
        classes: class names if some may have no text; default: those in the labels.

    Attributes:
        sheet: the datasheet.
        domains: domain names, sorted.
        classes: class names, sorted.
        domain_index: int32 (n,), positions in `domains`.
        class_index: int16 (n,), positions in `classes`.
        parts: int8 (n,), positions in `PARTS`.

    Raises:
        DataError: there is no text, or a label is not among the classes.

    Example:
        >>> reviews = TextDataset(Datasheet("r", "R"), ["good", "bad"], ["5", "1"], ["ann", "bob"], [0, 4])
        >>> reviews.text(1), reviews.domains, len(reviews.indices("test"))
        ('bad', ('ann', 'bob'), 1)
    """

    def __init__(
        self,
        sheet: Datasheet,
        texts: Iterable[str],
        labels: Sequence[str],
        groups: Sequence[str],
        parts: Sequence[int],
        *,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.sheet = sheet
        coded = [text.encode("utf-8", errors="surrogatepass") for text in texts]
        if not coded:
            raise DataError(f"{sheet.name} has no text")
        self._ends = np.cumsum([len(text) for text in coded])
        self._block = b"".join(coded)
        self.domains = tuple(sorted(set(groups)))
        self.classes = classes or tuple(sorted(set(labels)))
        strange = sorted(set(labels) - set(self.classes))
        if strange:
            raise DataError(f"{sheet.name} has the label '{strange[0]}'; its classes are {', '.join(self.classes)}")
        self.domain_index = _places(self.domains, groups).astype(np.int32)
        self.class_index = _places(self.classes, labels).astype(np.int16)
        self.parts = np.asarray(parts, dtype=np.int8)

    def __len__(self) -> int:
        """Return the number of texts n."""
        return len(self._ends)

    def text(self, i: int) -> str:
        """Return text i."""
        start = int(self._ends[i - 1]) if i else 0
        return self._block[start : int(self._ends[i])].decode("utf-8", errors="surrogatepass")

    def texts(self, indices: Iterable[int]) -> list[str]:
        """Return the texts at `indices`."""
        return [self.text(int(i)) for i in indices]

    def indices(self, part: str) -> npt.NDArray[np.int64]:
        """Return the positions of a part of the official division, ascending (DataError if there is no such part)."""
        if part not in PARTS:
            raise DataError(f"'{part}' is no part of {self.sheet.name}; they are {', '.join(PARTS)}")
        return np.flatnonzero(self.parts == PARTS.index(part))

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how many texts there are, int64 (domains, classes)."""
        table = np.zeros((len(self.domains), len(self.classes)), dtype=np.int64)
        np.add.at(table, (self.domain_index, self.class_index), 1)
        return table

    def content_sha256(self) -> str:
        """Return the hex sha256 of all texts, names and labels; the same wherever the data set lies."""
        digest = hashlib.sha256("\0".join([*self.domains, "", *self.classes]).encode())
        for array in (self._ends, self.domain_index, self.class_index, self.parts):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(self._block)
        return digest.hexdigest()


def _places(names: tuple[str, ...], values: Sequence[str]) -> npt.NDArray[np.int64]:
    place = {name: i for i, name in enumerate(names)}
    return np.fromiter((place[value] for value in values), dtype=np.int64, count=len(values))
