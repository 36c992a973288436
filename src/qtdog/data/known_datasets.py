"""Data sets that are no folders of images: rotated digits, ColoredMNIST, RotatedMNIST, WILDS (Camelyon17, reviews)."""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from qtdog.core.errors import DataError
from qtdog.core.random import numpy_stream
from qtdog.data.cards import ROTATED_DIGITS, DatasetCard
from qtdog.data.dataset import ID_TEST, ID_VAL, TEST, TRAIN, VAL, ImageDataset, sample_arrays
from qtdog.data.image_folder import FileDataset, ImageFile, ImageFiles, require_path
from qtdog.data.text import TextDataset

SIZE = 28


class RotatedDigits(ImageDataset):
    """scikit-learn's digits, upsampled to 28 x 28 and rotated counter-clockwise by 0, 15, …, 75 degrees.

    Each image is in exactly one domain. The assignment is a fixed random one that spreads every class evenly.

    Example:
        >>> digits = RotatedDigits()
        >>> len(digits), digits.read(0).shape
        (1797, (28, 28, 1))
    """

    def __init__(self) -> None:
        labels, angles, images = _rotated_scans()
        self.card = ROTATED_DIGITS
        self.domains = ROTATED_DIGITS.domains or ()
        self.classes = ROTATED_DIGITS.classes or ()
        order = np.lexsort((np.arange(len(labels)), labels, angles))
        names = [(self.domains[angles[i]], self.classes[labels[i]]) for i in order]
        self.keys = [f"{domain}/{label}/{i:04d}" for (domain, label), i in zip(names, order, strict=True)]
        self.domain_index, self.class_index = sample_arrays(
            self.domains, self.classes, [d for d, _ in names], [c for _, c in names]
        )
        self._images = images[order]

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i, uint8 (28, 28, 1)."""
        return self._images[i]

    def sample_signature(self, i: int) -> str:
        """Return the sha256 of the pixels of image i (they are in memory: nothing cheaper is needed)."""
        return self.sample_sha256(i)

    def sample_change_ns(self, i: int) -> int:
        """Return 0: these images cannot change while they are in use."""
        return 0

    def sample_sha256(self, i: int) -> str:
        """Return the sha256 of the pixels of image i."""
        return hashlib.sha256(self._images[i].tobytes()).hexdigest()


def assign_domains(labels: npt.NDArray[np.integer], n_domains: int = 6) -> npt.NDArray[np.int64]:
    """Return a domain per image (n,), fixed and random, with each class spread evenly.

    The images of each class are shuffled, and all are then dealt to the domains in turn.

    Example:
        >>> np.bincount(assign_domains(np.zeros(12, dtype=np.int64))).tolist()
        [2, 2, 2, 2, 2, 2]
    """
    rng = numpy_stream(0, "rotated-digits")
    dealt = np.concatenate([rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    domains = np.empty(len(labels), dtype=np.int64)
    domains[dealt] = np.arange(len(labels)) % n_domains
    return domains


@cache
def _rotated_scans() -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return scikit-learn's labels, the domain of each image, and the rotated images: made once in a process."""
    from sklearn.datasets import load_digits  # takes a second to import; only this data set needs it

    bunch: Any = load_digits()
    labels = np.asarray(bunch["target"])
    domains = assign_domains(labels)
    names = tuple(ROTATED_DIGITS.domains or ())
    degrees = [int(names[domain]) for domain in domains]
    images = [_render(scan, angle) for scan, angle in zip(np.asarray(bunch["images"]), degrees, strict=True)]
    return labels, domains, np.stack(images)


def _render(scan: npt.NDArray[np.floating], angle: int) -> npt.NDArray[np.uint8]:
    eight_bit = np.rint(scan * (255 / 16)).astype(np.uint8)  # scikit-learn stores grey values 0 … 16
    large = Image.fromarray(eight_bit).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(large.rotate(angle, Image.Resampling.BILINEAR))[:, :, None]


FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MAX_DIGITS = 1_000_000
FLIP_LABEL = 0.25
FLIP_COLOR = {"+90%": 0.1, "+80%": 0.2, "-90%": 0.9}
"""Domain → probability that the color contradicts the label (Arjovsky et al., 2019)."""

Pixels = npt.NDArray[np.uint8]


class MnistDataset(ImageDataset):
    """MNIST's digits in several domains.

    Args:
        card: the card of `colored-mnist` or `rotated-mnist`.
        root: the folder with MNIST's four files, packed with gzip or not.

    Raises:
        DataError: a file is missing or not what it should be.
    """

    def __init__(self, card: DatasetCard, root: Path) -> None:
        images, labels = read_mnist(root)
        names = card.domains or ()
        if card.kind == "colored-mnist":
            names = tuple(FLIP_COLOR)  # DomainBed's order: the first one gets the odd digit
        rng = numpy_stream(0, card.kind)
        dealt = rng.permutation(len(labels))
        place = np.empty(len(labels), dtype=np.int64)
        place[dealt] = np.arange(len(labels)) % len(names)
        classes, colors = labels.astype(np.int64), np.zeros(len(labels), dtype=np.int64)
        if card.kind == "colored-mnist":
            flips = rng.random((2, len(labels)))
            small = (labels < 5) ^ (flips[0] < FLIP_LABEL)
            contradicts = flips[1] < np.array([FLIP_COLOR[name] for name in names])[place]
            classes, colors = 1 - small.astype(np.int64), (small ^ contradicts).astype(np.int64)
        self.card, self.root = card, root
        self.domains, self.classes = card.domains or (), card.classes or ()
        domain = np.array([self.domains.index(name) for name in names])[place]
        order = np.lexsort((np.arange(len(labels)), classes, domain))
        pairs = [(self.domains[domain[i]], self.classes[classes[i]]) for i in order]
        self.keys = [f"{d}/{c}/{i:05d}" for (d, c), i in zip(pairs, order, strict=True)]
        self.domain_index, self.class_index = sample_arrays(
            self.domains, self.classes, [d for d, _ in pairs], [c for _, c in pairs]
        )
        self._images, self._colors = images[order], colors[order]
        self._render: Callable[[int], Pixels] = self._colored if card.kind == "colored-mnist" else self._rotated

    def read(self, i: int) -> Pixels:
        """Return image i, uint8 (28, 28, C): red or green if colored, grey if rotated."""
        return self._render(i)

    def _colored(self, i: int) -> Pixels:
        pixels = np.zeros((*self._images[i].shape, 3), dtype=np.uint8)
        pixels[..., 1 - self._colors[i]] = self._images[i]
        return pixels

    def _rotated(self, i: int) -> Pixels:
        angle = int(self.domains[self.domain_index[i]])
        return np.asarray(Image.fromarray(self._images[i]).rotate(angle, Image.Resampling.BICUBIC))[:, :, None]

    def sample_signature(self, i: int) -> str:
        """Return the sha256 of the pixels of image i (they are in memory: nothing cheaper is needed)."""
        return self.sample_sha256(i)

    def sample_change_ns(self, i: int) -> int:
        """Return 0: these images cannot change while they are in use."""
        return 0

    def sample_sha256(self, i: int) -> str:
        """Return the sha256 of the digit and its color."""
        return hashlib.sha256(self._images[i].tobytes() + bytes([int(self._colors[i])])).hexdigest()


def find_mnist(folder: Path) -> list[Path]:
    """Return MNIST's four files, wherever below `folder` they lie (DataError if one is missing)."""
    found = []
    for name in FILES:
        paths = sorted([*folder.rglob(name), *folder.rglob(f"{name}.gz")], key=lambda path: len(path.parts))
        if not paths:
            raise DataError(f"{folder} has no {name} (packed with gzip or not), one of MNIST's four files")
        found.append(paths[0])
    return found


def read_mnist(folder: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return images uint8 (n, H, W) and labels uint8 (n,) of training and test digits, one after the other.

    Raises:
        DataError: a file is missing, damaged, or does not fit its partner.
    """
    arrays = [_read_idx(path) for path in find_mnist(folder)]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{folder}: images {images.shape} and labels {labels.shape} do not fit each other")
    images, labels = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])
    if labels.max(initial=0) > 9:
        raise DataError(f"{folder}: a label is {labels.max()}, and digits end at 9")
    return images, labels


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An array in the idx format: two zero bytes, type 8 (uint8), number of axes, sizes (big-endian), values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 3:
                raise DataError(f"{path} is no file of MNIST")
            shape = np.frombuffer(stream.read(4 * head[3]), dtype=">u4").astype(np.int64)
            n = int(shape.prod())
            if shape[0] > MAX_DIGITS or n > MAX_DIGITS * 4096:
                raise DataError(f"{path} claims to hold {n:,} values")
            values = stream.read(n)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if len(values) != n:
        raise DataError(f"{path} is cut short: {len(values):,} of {n:,} values")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


CAMELYON17_COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
UNSEEN = {1: VAL, 2: TEST}
LABELS = ("normal", "tumor")


class _Patch(NamedTuple):
    record: ImageFile
    part: int


def open_camelyon17(root: Path, card: DatasetCard) -> FileDataset:
    """Return the patches listed in `root/metadata.csv`, with hospitals as domains and the official division.

    No patch is opened.

    Raises:
        DataError: the list is missing or malformed (the text gives the line).
    """
    path = root / "metadata.csv"
    require_path(path, "the list of patches")
    patches: list[_Patch] = []
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in CAMELYON17_COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)}")
        for row in reader:
            patches.append(_patch(row, f"{path}, line {reader.line_num}"))
    if not patches:
        raise DataError(f"{path} lists no patch")
    patches.sort()
    dataset = FileDataset(card, root, ImageFiles.of([patch.record for patch in patches]), LABELS)
    dataset.official_split = np.array([patch.part for patch in patches], dtype=np.int8)
    return dataset


def _patch(row: dict[str, str], where: str) -> _Patch:
    try:
        center, tumor, split = int(row["center"]), int(float(row["tumor"])), int(float(row["split"]))
        patient, place = row["patient"], f"x_{int(row['x_coord'])}_y_{int(row['y_coord'])}"
        if not patient.isdigit() or tumor not in (0, 1) or split not in (0, 1, 2, 3) or center < 0:
            raise ValueError("a value is out of range")
        slide = f"patient_{patient}_node_{int(row['node'])}"
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{where} is no patch: {error}") from error
    part = UNSEEN.get(center, (TRAIN, ID_VAL)[min(split, 1)])
    key = f"patches/{slide}/patch_{slide}_{place}.png"
    return _Patch(ImageFile(f"hospital_{center}", LABELS[tumor], key), part)


REVIEW_COLUMNS = ("reviewerID", "overall", "reviewText")
PART_OF = {0: TRAIN, 1: VAL, 2: ID_VAL, 3: TEST, 4: ID_TEST}
LEFT_OUT = -1


def open_reviews(root: Path, card: DatasetCard) -> TextDataset:
    """Return the reviews that count, in the order of the file, with reviewers as domains and stars as classes.

    Raises:
        DataError: a file is missing or malformed (the text gives the line), or the two do not fit each other.
    """
    reviews, division = root / "reviews.csv", root / "splits" / "user.csv"
    for path in (reviews, division):
        require_path(path, "the file")
    texts, labels, users, parts = [], [], [], []
    pairs = zip(_rows(reviews, REVIEW_COLUMNS), _rows(division, ("split",)), strict=True)
    try:
        for (line, review), (_, place) in pairs:
            part = _part(place["split"], f"{division}, row of {reviews.name}, line {line}")
            if part == LEFT_OUT:
                continue
            texts.append(review["reviewText"])
            users.append(review["reviewerID"])
            labels.append(_stars(review["overall"], f"{reviews}, line {line}"))
            parts.append(part)
    except ValueError as error:
        raise DataError(f"{reviews} and {division} do not have the same number of rows") from error
    return TextDataset(card, texts, labels, users, parts, classes=card.classes)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)}")
        try:
            for row in reader:
                yield reader.line_num, _whole(row, columns, f"{path}, line {reader.line_num}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num} cannot be read: {error}") from error


def _whole(row: dict[str, str], columns: tuple[str, ...], where: str) -> dict[str, str]:
    if any(row[name] is None for name in columns):
        raise DataError(f"{where} is cut short")
    return row


def _part(value: str, where: str) -> int:
    try:
        number = int(float(value))
        return LEFT_OUT if number == LEFT_OUT else PART_OF[number]
    except (ValueError, KeyError, OverflowError) as error:
        raise DataError(f"{where}: the split is '{value}'; it must be -1, 0, 1, 2, 3 or 4") from error


def _stars(value: str, where: str) -> str:
    try:
        return str(int(float(value)))
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: 'overall' is '{value}', not a number of stars") from error
