"""The contract of a data set (samples that each belong to one domain and one class), of images, and views of it."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError
from qtdog.core.progress import Progress
from qtdog.data.cards import DatasetCard
from qtdog.data.decode import to_square
from qtdog.data.scan import PassedOver

SPLIT_NAMES = ("train", "id_val", "id_test", "val", "test")
"""Trained on; held out of the training domains for selection and for a report; unseen domains, for either."""

TRAIN, ID_VAL, ID_TEST, VAL, TEST = range(5)


N_THREADS = 4
BLOCK = 16
"""So many images go to a thread at once: handing over a small one takes longer than reading it."""
TRIAL, QUICK_S = 4, 1e-4
"""If the first few of a portion take less each, one thread does the rest: several would wait for Python's lock."""
T = TypeVar("T")
Resize = Callable[[npt.NDArray[np.uint8], int], npt.NDArray[np.uint8]]


class DomainDataset(ABC):
    """Samples (images, texts) in a fixed order (domain, class, file name), each with one domain and one class.

    The order is the one that torchvision's `ImageFolder` gives each domain, so that splits equal DomainBed's. How a
    sample is read is a matter of its kind: `ImageDataset`, `data.text.TextDomains`.

    Attributes:
        card: the card.
        domains: domain names, sorted.
        classes: class names, sorted.
        keys: a stable name per sample (n,), such as its relative path.
        domain_index: int16 (n,), positions in `domains`.
        class_index: int16 (n,), positions in `classes`.
        official_split: int8 (n,), positions in `data.dataset.SPLIT_NAMES` if the data set
            comes with an official division, else None.
        skipped: (key, reason) of images that were left out because they cannot be read.
        passed_over: the files of its folder that are no images of it; None if it has no folder of its own.
        notes: sentences on what looks wrong without being an error, such as names that differ in case alone.
    """

    card: DatasetCard
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    keys: list[str]
    domain_index: npt.NDArray[np.int16]
    class_index: npt.NDArray[np.int16]
    official_split: npt.NDArray[np.int8] | None = None
    skipped: Sequence[tuple[str, str]] = ()
    passed_over: PassedOver | None = None
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        """Return the number of samples n."""
        return len(self.keys)

    def indices(self, domain: str) -> npt.NDArray[np.int64]:
        """Return the positions of a domain's samples, ascending (DataError if there is no such domain)."""
        if domain not in self.domains:
            raise DataError(f"'{domain}' is not a domain of {self.card.name}; it has {', '.join(self.domains)}")
        return np.flatnonzero(self.domain_index == self.domains.index(domain))

    def trains_on(self, domain: str) -> bool:
        """Return whether a domain may be trained on: an official division leaves some to validation and test."""
        return self.official_split is None or bool((self.official_split[self.indices(domain)] == TRAIN).any())

    def sources(self, target: str | None) -> tuple[str, ...]:
        """Return the domains that are trained on when `target` is not: all but it that may be."""
        return tuple(domain for domain in self.domains if domain != target and self.trains_on(domain))

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how many samples there are, int64 (domains, classes)."""
        table = np.zeros((len(self.domains), len(self.classes)), dtype=np.int64)
        np.add.at(table, (self.domain_index, self.class_index), 1)
        return table

    def missing_classes(self) -> list[tuple[str, str]]:
        """Return the (domain, class) pairs that have no sample."""
        return [(self.domains[d], self.classes[c]) for d, c in np.argwhere(self.counts() == 0)]

    @abstractmethod
    def signature(self) -> str:
        """Return a cheap fingerprint that changes whenever a sample is changed, added, removed or relabelled."""

    @abstractmethod
    def newest_change_ns(self) -> int:
        """Return when the latest change of any sample happened (ns since 1970), or 0 if they cannot change."""

    @abstractmethod
    def content_sha256(self, progress: Progress = None, hashes: Iterable[str] | None = None) -> str:
        """Return the hex sha256 of all samples' content, names and labels; the same wherever the data set lies.

        Args:
            progress: of hashing.
            hashes: of each sample's content, if known.

        Raises:
            DataError: a sample cannot be read.
        """


class ImageDataset(DomainDataset):
    """A data set of images, each of which can be read."""

    @abstractmethod
    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i at its native size, uint8 (H, W, C).

        Raises:
            DataError: the image cannot be read; the text names it.
        """

    @abstractmethod
    def sample_signature(self, i: int) -> str:
        """Return a cheap fingerprint of image i that changes whenever it is changed (DataError if it is gone)."""

    @abstractmethod
    def sample_change_ns(self, i: int) -> int:
        """Return when image i was changed last (ns since 1970), or 0 if it cannot change (DataError if it is gone)."""

    @abstractmethod
    def sample_sha256(self, i: int) -> str:
        """Return the hex sha256 of the stored content of image i (DataError if it cannot be had)."""

    def read_resized(self, i: int, size: int) -> npt.NDArray[np.uint8]:
        """Return image i as uint8 (size, size, C), resized without cropping (DataError if unreadable)."""
        return to_square(self.read(i), size)

    def read_hashed(self, i: int, size: int, resize: Resize = to_square) -> tuple[npt.NDArray[np.uint8], str]:
        """Return image i, resized to `size`, and `sample_sha256` of the very content that it was made from.

        Args:
            i: which image.
            size: of the result, in pixels.
            resize: (pixels, size) → pixels; default: to a square, as `read_resized` does.

        Raises:
            DataError: the image cannot be read.
        """
        return resize(self.read(i), size), self.sample_sha256(i)

    def signature(self) -> str:
        """Return a cheap fingerprint that changes whenever an image is changed, added, removed or relabelled."""
        digest = hashlib.sha256(f"{self.domains}\0{self.classes}".encode())
        for i, key in enumerate(self.keys):
            labels = f"{self.domain_index[i]}\0{self.class_index[i]}"
            digest.update(f"\0{key}\0{labels}\0{self.sample_signature(i)}".encode())
        return digest.hexdigest()

    def newest_change_ns(self) -> int:
        """Return when the latest change of any image happened (ns since 1970), or 0 if they cannot change."""
        return max(self.sample_change_ns(i) for i in range(len(self)))

    def content_sha256(self, progress: Progress = None, hashes: Iterable[str] | None = None) -> str:
        """Return the hex sha256 of all images' content, names and labels; the same wherever the data set lies.

        Args:
            progress: of hashing.
            hashes: `sample_sha256` of each image, if known.

        Raises:
            DataError: an image cannot be read.
        """
        digest = hashlib.sha256("\0".join([*self.domains, "", *self.classes]).encode())
        hashes = self.sample_hashes(progress) if hashes is None else hashes
        for row in zip(self.keys, self.domain_index.tolist(), self.class_index.tolist(), hashes, strict=True):
            digest.update("\0%s\0%d\0%d\0%s".__mod__(row).encode())
        return digest.hexdigest()

    def files(self) -> tuple[str, Sequence[str]] | None:
        """Return the data set's folder and the path in it of each image's own file; None if images are no files."""
        return None

    def sample_hashes(self, progress: Progress = None) -> list[str]:
        """Return `sample_sha256` of every image, computed in a few threads (DataError if one cannot be read)."""
        return map_samples(self.sample_sha256, len(self), progress)


def require_images(dataset: DomainDataset) -> ImageDataset:
    """Return the data set if it is of images (DataError if it is of texts)."""
    if not isinstance(dataset, ImageDataset):
        raise DataError(f"{dataset.card.name} is a data set of texts, and images are wanted here")
    return dataset


def map_samples(function: Callable[[int], T], n: int, progress: Progress = None) -> list[T]:
    """Return [function(0), …, function(n-1)], computed in a few threads; the first error ends it.

    Example:
        >>> map_samples(str, 3)
        ['0', '1', '2']
    """
    return list(iter_samples(function, n, progress))


def iter_samples(function: Callable[[int], T], n: int, progress: Progress = None) -> Iterator[T]:
    """Yield function(0), …, function(n-1), computed in a few threads, or in this one where each takes very little.

    Example:
        >>> list(iter_samples(str, 3))
        ['0', '1', '2']
    """
    with ThreadPoolExecutor(N_THREADS) as pool:
        for start in range(0, n, 1024):  # in portions, so that an error or Ctrl-C does not wait for all the rest
            end, begun = min(n, start + 1024), perf_counter()
            tried = [function(i) for i in range(start, min(start + TRIAL, end))]
            apply = map if perf_counter() - begun < TRIAL * QUICK_S else pool.map
            yield from tried
            for block in apply(partial(_block, function, end), range(start + TRIAL, end, BLOCK)):
                yield from block
            if progress is not None:
                progress(end, n)


def _block(function: Callable[[int], T], end: int, first: int) -> list[T]:
    return [function(i) for i in range(first, min(end, first + BLOCK))]


MAX_NAMES = 32_767
RESERVED_DOMAINS = ("none", "all")
"""What `data.target` means something else by."""


def check_domain_names(dataset: str, domains: Sequence[str]) -> None:
    """Refuse a domain whose name has another meaning where a target is chosen.

    Raises:
        DataError: a domain is called 'none' or 'all'.

    Example:
        >>> check_domain_names("photos", ["north", "None"])
    """
    for name in RESERVED_DOMAINS:
        if name in domains:
            meaning = "no domain" if name == "none" else "every domain in turn"
            text = f"a domain of {dataset} is called '{name}', but as a target this word means {meaning}"
            raise DataError(f"{text}: rename it, such as '{name}_'")


MISSING = frozenset(
    [
        "nan",
        "none",
        "null",
        "<na>",
        "nat",
        "#n/a",
        "n/a",
        "undefined",
    ]  # as pandas, R, SQL, spreadsheets and JavaScript write it
)


def is_missing(text: str) -> bool:
    """Return whether a label or domain in a list is how programs write that there is none.

    Example:
        >>> [is_missing(text) for text in ("NaN", "", "-1", "-1.0", "nano", "1")]
        [True, True, True, True, False, False]
    """
    return not text or text.lower() in MISSING or text in ("-1", "-1.0", "NA")


def composed(name: str) -> str:
    r"""Return a name in Unicode's composed form (NFC), in which equal letters are equal.

    Example:
        >>> composed("cafe\u0301") == "caf\u00e9"
        True
    """
    return unicodedata.normalize("NFC", name)


def look_alikes(what: str, names: Sequence[str]) -> list[str]:
    """Return a sentence for each group of names that differ in case, blanks, width or the form of a number alone.

    Example:
        >>> look_alikes("classes", ["0", "0.0", "cat"])
        ["the classes '0' and '0.0' differ in their form alone: are they one?"]
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_plain_form(name), []).append(name)
    return [
        f"the {what} {' and '.join(map(ascii, group))} differ in their form alone: are they one?"
        for group in groups.values()
        if len(group) > 1
    ]


def _plain_form(name: str) -> str:
    text = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    try:
        number = float(text)
    except ValueError:
        return text
    return str(number) if math.isfinite(number) and "_" not in text else text


def sample_arrays(
    domains: tuple[str, ...], classes: tuple[str, ...], domain_names: Iterable[str], class_names: Iterable[str]
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    """Return (domain_index, class_index) int16 (n,) of the names of each sample's domain and class.

    Example:
        >>> sample_arrays(("a", "b"), ("x",), ["b"], ["x"])
        (array([1], dtype=int16), array([0], dtype=int16))
    """
    for what, names in (("domains", domains), ("classes", classes)):
        if len(names) > MAX_NAMES:
            text = f"there are {len(names):,} {what}, more than {MAX_NAMES:,}"
            raise DataError(f"{text}; such as '{names[0]}'. Is this the right column?")
    domain_index, class_index = (
        np.fromiter(map(dict(zip(names, range(len(names)), strict=True)).__getitem__, column), np.int16)
        for names, column in ((domains, domain_names), (classes, class_names))
    )
    return domain_index, class_index


class ImageSubset(ImageDataset):
    """Images of another data set, in the same order; nothing asks for the others.

    Content, signature and decoded cache are those of the chosen images alone. The classes are those of the whole, so
    that labels mean the same.

    Args:
        dataset: the whole.
        indices: positions of the chosen images, ascending.
        domains: positions of the domains that remain, ascending; those of all chosen images are among them.
        card: the card of the chosen images.
    """

    def __init__(
        self, dataset: ImageDataset, indices: npt.NDArray[np.int64], domains: list[int], card: DatasetCard
    ) -> None:
        self.card = card
        self.domains = tuple(dataset.domains[d] for d in domains)
        self.classes = dataset.classes
        self.keys = [dataset.keys[i] for i in indices]
        self.domain_index = np.searchsorted(domains, dataset.domain_index[indices]).astype(np.int16)
        self.class_index = dataset.class_index[indices]
        self.official_split = None if dataset.official_split is None else dataset.official_split[indices]
        self.skipped = dataset.skipped
        self.passed_over = dataset.passed_over
        self.notes = dataset.notes
        self._dataset = dataset
        self._indices = indices.tolist()

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return chosen image i at its native size, uint8 (H, W, C) (DataError if it cannot be read)."""
        return self._dataset.read(self._indices[i])

    def read_resized(self, i: int, size: int) -> npt.NDArray[np.uint8]:
        """Return chosen image i as uint8 (size, size, C) (DataError if it cannot be read)."""
        return self._dataset.read_resized(self._indices[i], size)

    def read_hashed(self, i: int, size: int, resize: Resize = to_square) -> tuple[npt.NDArray[np.uint8], str]:
        """Return chosen image i, resized, and the sha256 of the content that it was made from."""
        return self._dataset.read_hashed(self._indices[i], size, resize)

    def files(self) -> tuple[str, Sequence[str]] | None:
        """Return the whole data set's folder and the files of the chosen images, or None if images are no files."""
        whole = self._dataset.files()
        if whole is None:
            return None
        root, names = whole
        chosen = [names[int(i)] for i in self._indices]
        return root, chosen

    def sample_signature(self, i: int) -> str:
        """Return the whole data set's fingerprint of chosen image i."""
        return self._dataset.sample_signature(self._indices[i])

    def sample_change_ns(self, i: int) -> int:
        """Return when chosen image i was changed last."""
        return self._dataset.sample_change_ns(self._indices[i])

    def sample_sha256(self, i: int) -> str:
        """Return the hex sha256 of the stored content of chosen image i (DataError if it cannot be had)."""
        return self._dataset.sample_sha256(self._indices[i])


class DomainSubset(ImageSubset):
    """The images of some domains of another data set, in the same order; nothing asks for an image of the others.

    Content, signature and decoded cache are those of the kept images alone, so that a change in another domain changes
    nothing here. The classes are those of the whole, so that labels mean the same.

    Args:
        dataset: the whole.
        domains: names of the domains to keep.

    Raises:
        DataError: a name is no domain of `dataset`, or none is kept.

    Example:
        >>> from qtdog.data.known_datasets import RotatedDigits
        >>> subset = DomainSubset(RotatedDigits(), ["15", "0"])
        >>> subset.domains, len(subset)
        (('0', '15'), 600)
    """

    def __init__(self, dataset: ImageDataset, domains: Collection[str]) -> None:
        if not domains:
            raise DataError(f"no domain of {dataset.card.name} is kept; it has {', '.join(dataset.domains)}")
        places = np.sort(np.concatenate([dataset.indices(domain) for domain in sorted(set(domains))]))
        kept = [d for d, domain in enumerate(dataset.domains) if domain in domains]
        names = tuple(dataset.domains[d] for d in kept)
        super().__init__(dataset, places, kept, _restricted(dataset.card, names))


def _restricted(card: DatasetCard, domains: tuple[str, ...]) -> DatasetCard:
    """Return the card as it is for these domains."""
    counts = card.expected_counts
    return replace(
        card,
        domains=None if card.domains is None else tuple(name for name in card.domains if name in domains),
        expected_counts=None if counts is None else {name: n for name, n in counts.items() if name in domains},
    )
