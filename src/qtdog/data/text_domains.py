"""Texts as training takes a data set: their official division as domains, one of them seen and two unseen."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.parts import TEST, VAL
from qtdog.data.text import TextDataset

SEEN, UNSEEN, UNSEEN_VAL = DOMAINS = ("seen", "unseen", "unseen_val")


class TextDomains(DomainDataset):
    """A data set of texts whose domains are too many to draw a batch from each (a domain per reviewer).

    Its domains here are the sides of the official division: `seen` (train, id_val, id_test), which is trained, selected
    and reported on, and `unseen` (test) and `unseen_val` (val), whose authors are in no other part. The authors remain
    as groups, over which accuracy is measured.

    Args:
        texts: the texts.

    Attributes:
        group_index: int32 (n,), the author of each text.

    Raises:
        DataError: no text is to be trained on, or none is unseen.

    Example:
        >>> from qtdog.data.sheet import Datasheet
        >>> texts = TextDataset(Datasheet("r", "R"), ["good", "bad"], ["5", "1"], ["ann", "bob"], [0, 4])
        >>> TextDomains(texts).domains
        ('seen', 'unseen')
    """

    def __init__(self, texts: TextDataset) -> None:
        self.sheet = texts.sheet
        self.classes = texts.classes
        sides = np.where(texts.parts == TEST, 1, np.where(texts.parts == VAL, 2, 0))
        kept = np.unique(sides)
        self.domains = tuple(DOMAINS[side] for side in kept)
        if not {SEEN, UNSEEN} <= set(self.domains):
            raise DataError(f"{texts.sheet.name} needs texts to train on and unseen ones, found {self.domains}")
        self.domain_index = np.searchsorted(kept, sides).astype(np.int16)
        self.class_index = texts.class_index
        self.group_index = texts.domain_index
        self.parts = texts.parts
        self.keys = [str(i) for i in range(len(texts))]
        self._texts = texts
        self._content = ""

    def texts(self, indices: npt.NDArray[np.integer]) -> list[str]:
        """Return the texts at `indices`."""
        return self._texts.texts(indices)

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Refuse: there is no image (DataError)."""
        raise DataError(f"{self.sheet.name} is a data set of texts, and images are wanted here")

    def sample_signature(self, i: int) -> str:
        """Return the hex sha256 of text i."""
        return self.sample_sha256(i)

    def sample_change_ns(self, i: int) -> int:
        """Return 0: the texts are in memory."""
        return 0

    def sample_sha256(self, i: int) -> str:
        """Return the hex sha256 of text i."""
        return hashlib.sha256(self._texts.text(i).encode("utf-8", errors="surrogatepass")).hexdigest()

    def signature(self) -> str:
        """Return the hex sha256 of all texts, names and labels."""
        return self.content_sha256()

    def newest_change_ns(self) -> int:
        """Return 0: the texts are in memory."""
        return 0

    def content_sha256(self, progress: Progress = None, hashes: object = None) -> str:
        """Return the hex sha256 of all texts, names and labels; it is fast enough to need no progress."""
        self._content = self._content or self._texts.content_sha256()
        return self._content
