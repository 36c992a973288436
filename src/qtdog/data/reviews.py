"""WILDS Amazon as it lies on disk: `reviews.csv` and `splits/user.csv`, read without the package `wilds`.

Ni et al., EMNLP 2019; Koh et al.: WILDS, ICML 2021. The two files have a row per review, in the same order; `split` is
-1 for a review that does not count, else one of five parts. A domain is a reviewer; those of `val` and `test` are in no
other part.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from qtdog.core.errors import DataError
from qtdog.data.files import require_path
from qtdog.data.parts import ID_TEST, ID_VAL, TEST, TRAIN, VAL
from qtdog.data.sheet import Datasheet
from qtdog.data.text import TextDataset

COLUMNS = ("reviewerID", "overall", "reviewText")
PART_OF = {0: TRAIN, 1: VAL, 2: ID_VAL, 3: TEST, 4: ID_TEST}
LEFT_OUT = -1


def open_reviews(root: Path, sheet: Datasheet) -> TextDataset:
    """Return the reviews that count, in the order of the file, with reviewers as domains and stars as classes.

    Raises:
        DataError: a file is missing or malformed (the text gives the line), or the two do not fit each other.
    """
    reviews, division = root / "reviews.csv", root / "splits" / "user.csv"
    for path in (reviews, division):
        require_path(path, "the file")
    texts, labels, users, parts = [], [], [], []
    pairs = zip(_rows(reviews, COLUMNS), _rows(division, ("split",)), strict=True)
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
    return TextDataset(sheet, texts, labels, users, parts, classes=sheet.classes)


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
