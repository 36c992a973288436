"""WILDS data sets as they lie on disk (Camelyon17, Amazon reviews), read without the package `wilds`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qtdog.core.errors import DataError
from qtdog.data.cards import DatasetCard
from qtdog.data.dataset import ID_TEST, ID_VAL, TEST, TRAIN, VAL
from qtdog.data.image_folder import FileDataset, ImageFile, require_path
from qtdog.data.text import TextDataset

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
    dataset = FileDataset(card, root, [patch.record for patch in patches], LABELS)
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
