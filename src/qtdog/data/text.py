"""Texts that each belong to one domain and one class: the contract, the official division, and the token cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.errors import DataError
from qtdog.core.files import atomic_folder, remove_leftovers
from qtdog.core.progress import Progress
from qtdog.data.augment import CPU, BufferPool, upload
from qtdog.data.cards import DatasetCard
from qtdog.data.dataset import SPLIT_NAMES, TEST, VAL, DomainDataset
from qtdog.data.decoded_cache import Indices, InputCache, cache_root


class TextDataset:
    """Texts in a fixed order; how they become numbers is the model's affair.

    They are held as one UTF-8 block, which takes a third of the memory of as many strings.

    Args:
        card: the card.
        texts: the texts.
        labels: class name of each.
        groups: domain of each (a reviewer, a site).
        official_split: position in `SPLIT_NAMES` of each, the official division.
        classes: class names if some may have no text; default: those in the labels.

    Attributes:
        card: the card.
        domains: domain names, sorted.
        classes: class names, sorted.
        domain_index: int32 (n,), positions in `domains`.
        class_index: int16 (n,), positions in `classes`.
        official_split: int8 (n,), positions in `SPLIT_NAMES`.

    Raises:
        DataError: there is no text, or a label is not among the classes.

    Example:
        >>> reviews = TextDataset(DatasetCard("r", "R"), ["good", "bad"], ["5", "1"], ["ann", "bob"], [0, 4])
        >>> reviews.text(1), reviews.domains, len(reviews.indices("test"))
        ('bad', ('ann', 'bob'), 1)
    """

    def __init__(
        self,
        card: DatasetCard,
        texts: Iterable[str],
        labels: Sequence[str],
        groups: Sequence[str],
        official_split: Sequence[int],
        *,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.card = card
        coded = [text.encode("utf-8", errors="surrogatepass") for text in texts]
        if not coded:
            raise DataError(f"{card.name} has no text")
        self._ends = np.cumsum([len(text) for text in coded])
        self._block = b"".join(coded)
        self.domains = tuple(sorted(set(groups)))
        self.classes = classes or tuple(sorted(set(labels)))
        strange = sorted(set(labels) - set(self.classes))
        if strange:
            raise DataError(f"{card.name} has the label '{strange[0]}'; its classes are {', '.join(self.classes)}")
        self.domain_index = _places(self.domains, groups).astype(np.int32)
        self.class_index = _places(self.classes, labels).astype(np.int16)
        self.official_split = np.asarray(official_split, dtype=np.int8)

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
        if part not in SPLIT_NAMES:
            raise DataError(f"'{part}' is no part of {self.card.name}; they are {', '.join(SPLIT_NAMES)}")
        return np.flatnonzero(self.official_split == SPLIT_NAMES.index(part))

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how many texts there are, int64 (domains, classes)."""
        table = np.zeros((len(self.domains), len(self.classes)), dtype=np.int64)
        np.add.at(table, (self.domain_index, self.class_index), 1)
        return table

    def content_sha256(self) -> str:
        """Return the hex sha256 of all texts, names and labels; the same wherever the data set lies."""
        digest = hashlib.sha256("\0".join([*self.domains, "", *self.classes]).encode())
        for array in (self._ends, self.domain_index, self.class_index, self.official_split):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(self._block)
        return digest.hexdigest()


def _places(names: tuple[str, ...], values: Sequence[str]) -> npt.NDArray[np.int64]:
    place = {name: i for i, name in enumerate(names)}
    return np.fromiter((place[value] for value in values), dtype=np.int64, count=len(values))


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
        >>> from qtdog.data.cards import DatasetCard
        >>> texts = TextDataset(DatasetCard("r", "R"), ["good", "bad"], ["5", "1"], ["ann", "bob"], [0, 4])
        >>> TextDomains(texts).domains
        ('seen', 'unseen')
    """

    def __init__(self, texts: TextDataset) -> None:
        self.card = texts.card
        self.classes = texts.classes
        sides = np.where(texts.official_split == TEST, 1, np.where(texts.official_split == VAL, 2, 0))
        kept = np.unique(sides)
        self.domains = tuple(DOMAINS[side] for side in kept)
        if not {SEEN, UNSEEN} <= set(self.domains):
            raise DataError(f"{texts.card.name} needs texts to train on and unseen ones, found {self.domains}")
        self.domain_index = np.searchsorted(kept, sides).astype(np.int16)
        self.class_index = texts.class_index
        self.group_index = texts.domain_index
        self.official_split = texts.official_split
        self.keys = [str(i) for i in range(len(texts))]
        self._texts = texts
        self._content = ""

    def texts(self, indices: npt.NDArray[np.integer]) -> list[str]:
        """Return the texts at `indices`."""
        return self._texts.texts(indices)

    def signature(self) -> str:
        """Return the hex sha256 of all texts, names and labels."""
        return self.content_sha256()

    def newest_change_ns(self) -> int:
        """Return 0: the texts are in memory."""
        return 0

    def content_sha256(self, progress: Progress = None, hashes: Iterable[str] | None = None) -> str:
        """Return the hex sha256 of all texts, names and labels; it is fast enough to need no progress."""
        self._content = self._content or self._texts.content_sha256()
        return self._content


TOKENS = "tokens.u16"
N_TOGETHER = 1024
N_BYTES = 2
Tokenize = Callable[[Sequence[str]], npt.NDArray[np.integer]]


class TokenCache(InputCache):
    """n texts of one length in one file.

    Args:
        path: a file of n · length unsigned 16-bit numbers, little-endian.
        n: texts.
        length: tokens of each.
    """

    def __init__(self, path: Path, n: int, length: int) -> None:
        self.length = length
        super().__init__(path, n, N_BYTES * length)

    def gather(self, indices: Indices, pool: BufferPool | None = None) -> Tensor:
        """Return the token numbers of the texts at `indices`, int64 (b, length); errors as in `InputCache.gather`."""
        rows = np.empty((len(indices), self._row_bytes), dtype=np.uint8)
        self._read_rows(indices, rows)
        return torch.from_numpy(rows.view("<u2").astype(np.int64))

    def network_inputs(
        self, indices: Indices, mean: Sequence[float], std: Sequence[float], device: torch.device = CPU
    ) -> Tensor:
        """Return the token numbers at `indices`, int64 (b, length); nothing is normalized."""
        return upload(self.gather(indices), device)


def open_tokens(
    dataset: TextDomains,
    tokenize: Tokenize,
    *,
    name: str,
    length: int,
    progress: Progress = None,
    folder: Path | None = None,
) -> TokenCache:
    """Return the data set's texts as numbers, tokenizing them now unless that was done before.

    Args:
        dataset: the texts.
        tokenize: texts → numbers (n, length), 0 behind the end.
        name: of the tokenizer; with the content and the length it is the key.
        length: tokens of each text.
        progress: of tokenizing.
        folder: of the caches; default `cache_root()`.

    Raises:
        DataError: the tokenizer gives numbers that do not fit 16 bits, or rows of another length.
        RunError: the cache folder cannot be written.
    """
    folder = folder or cache_root()
    key = hashlib.sha256(json.dumps([dataset.content_sha256(), name, length]).encode()).hexdigest()
    place = folder / "tokens" / key[:24]
    file = place / TOKENS
    if not file.is_file() or file.stat().st_size != N_BYTES * length * len(dataset):
        shutil.rmtree(place, ignore_errors=True)
        remove_leftovers(place.parent)
        with atomic_folder(place) as temporary, (temporary / TOKENS).open("wb") as stream:
            for tokens in _portions(dataset, tokenize, progress):
                stream.write(_checked(tokens, length).astype("<u2").tobytes())
    return TokenCache(file, len(dataset), length)


def _portions(dataset: TextDomains, tokenize: Tokenize, progress: Progress) -> Iterator[npt.NDArray[np.integer]]:
    for start in range(0, len(dataset), N_TOGETHER):
        end = min(len(dataset), start + N_TOGETHER)
        yield tokenize(dataset.texts(np.arange(start, end)))
        if progress is not None:
            progress(end, len(dataset))


def _checked(tokens: npt.NDArray[np.integer], length: int) -> npt.NDArray[np.integer]:
    if tokens.ndim != 2 or tokens.shape[1] != length or tokens.min() < 0 or tokens.max() >= 1 << (8 * N_BYTES):
        found = f"numbers {tokens.min()} … {tokens.max()} of shape {tokens.shape}"
        raise DataError(f"the tokenizer gave {found}, not 16 bits in rows of {length}")
    return tokens
