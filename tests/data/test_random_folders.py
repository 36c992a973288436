"""Random folders and lists of images: train or refuse, and every count adds up to the files on the disk.

The trees, and what is checked of each, are those of `tests/stress/folders.py`, which makes ten thousand.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from qtdog.core.errors import DataError
from qtdog.data.open import open_dataset
from support import load_script

SEEDS, TRAINED = range(60), range(0, 60, 6)


folders = load_script("tests/stress/folders.py")


def test_counts_add_up_to_the_files_on_the_disk(tmp_path: Path) -> None:
    kinds = Counter()
    for seed in SEEDS:
        place = tmp_path / str(seed)
        place.mkdir()
        case = folders.make_case(place, seed)
        kinds[folders.check_case(case, place, random.Random(seed), trains=seed in TRAINED).kind] += 1
    assert kinds["opened"] > 20
    assert kinds["refused"] > 10


@pytest.mark.parametrize("label", folders.REFUSED_LABELS)
def test_a_label_that_means_no_value_is_refused_with_its_line(tmp_path: Path, label: str) -> None:
    rows = [{"path": f"{i}.png", "label": "cat", "domain": "ab"[i % 2]} for i in range(4)]
    for row in rows:
        (tmp_path / row["path"]).write_bytes(folders.SOUND[0])
    rows[2]["label"] = label
    for name, line in (("list.csv", 4), ("list.jsonl", 3)):
        folders.write_list(tmp_path / name, rows)
        with pytest.raises(DataError, match=rf"{name}, line {line}: '(class|label)' is"):
            open_dataset(str(tmp_path / name))


def test_a_wrong_count_is_found(tmp_path: Path) -> None:
    case = folders.make_case(tmp_path, 2)
    case.n_sound += 1
    with pytest.raises(AssertionError, match="images instead of"):
        folders.check_case(case, tmp_path, random.Random(2), trains=False)
