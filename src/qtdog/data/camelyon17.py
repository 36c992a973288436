"""WILDS Camelyon17 as it lies on disk: `metadata.csv` and `patches/`, read without the package `wilds`.

Bandi et al., 2018; Koh et al.: WILDS, ICML 2021. A row of the metadata is a patch: patient, node and place make its
file name, `center` is the hospital, `tumor` the label, `split` 0 (train) or 1 (held out of the training hospitals).
Hospital 1 is the validation and hospital 2 the test out of distribution.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qtdog.core.errors import DataError
from qtdog.data.files import FileDataset, Record, require_path
from qtdog.data.parts import ID_VAL, TEST, TRAIN, VAL
from qtdog.data.sheet import Datasheet

COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
UNSEEN = {1: VAL, 2: TEST}
LABELS = ("normal", "tumor")


class _Patch(NamedTuple):
    record: Record
    part: int


def open_camelyon17(root: Path, sheet: Datasheet) -> FileDataset:
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
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)}")
        for row in reader:
            patches.append(_patch(row, f"{path}, line {reader.line_num}"))
    if not patches:
        raise DataError(f"{path} lists no patch")
    patches.sort()
    dataset = FileDataset(sheet, root, [patch.record for patch in patches], LABELS)
    dataset.parts = np.array([patch.part for patch in patches], dtype=np.int8)
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
    return _Patch(Record(f"hospital_{center}", LABELS[tumor], key), part)
