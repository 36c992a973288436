"""A data set that changed is decoded only where it changed, and what comes out is what a fresh build gives."""

# attributes of modules and options that are not there are what is tested
# pyright: reportReturnType=false

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qtdog.data import decoded_cache as reuse
from qtdog.data.dataset import DomainSubset
from qtdog.data.decoded_cache import IMAGES, Rows, copy_cached_rows, open_cache, write_row_hashes
from qtdog.data.image_folder import FileDataset, open_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the keys of decoded images are added to."""
    keys: list[str] = []
    read = FileDataset.read_hashed

    def spy(self: FileDataset, i: int, *how: Any) -> Any:
        keys.append(self.keys[i])
        return read(self, i, *how)

    monkeypatch.setattr(FileDataset, "read_hashed", spy)
    return keys


def fresh_bytes(root: Path, size: int, tmp_path: Path) -> bytes:
    place = tmp_path / "fresh"
    shutil.rmtree(place, ignore_errors=True)
    return open_cache(open_folder(root), size, folder=place).path.read_bytes()


def paint(path: Path, color: tuple[int, int, int]) -> None:
    Image.new("RGB", (20, 24), color).save(path)


def test_only_new_and_changed_files_are_decoded(
    image_tree: Path, folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    old = -(10**18)  # all files count as old
    open_cache(open_folder(image_tree), 10, folder=folder, settled_ns=old)
    assert len(decoded) == 54
    decoded.clear()
    paint(image_tree / "night" / "cat" / "2.png", (9, 8, 7))
    paint(image_tree / "indoor" / "bird" / "00.png", (1, 2, 3))
    (image_tree / "outdoor" / "dog" / "5.png").unlink()
    (image_tree / "outdoor" / "cat" / "0.png").rename(image_tree / "outdoor" / "cat" / "9.png")
    cache = open_cache(open_folder(image_tree), 10, folder=folder, settled_ns=old)
    assert sorted(decoded) == ["indoor/bird/00.png", "night/cat/2.png"]
    assert cache.path.read_bytes() == fresh_bytes(image_tree, 10, tmp_path)


def test_an_image_that_is_gone_is_not_in_the_new_cache(image_tree: Path, folder: Path, decoded: list[str]) -> None:
    paint(image_tree / "night" / "cat" / "2.png", (9, 8, 7))
    assert (open_cache(open_folder(image_tree), 10, folder=folder).gather(range(54)) == 9).any()
    (image_tree / "night" / "cat" / "2.png").unlink()
    decoded.clear()
    images = open_cache(open_folder(image_tree), 10, folder=folder).gather(range(53))
    assert decoded == []
    assert not (images.reshape(-1, 3).numpy() == (9, 8, 7)).all(axis=1).any()


def test_another_size_takes_nothing_over(image_tree: Path, folder: Path, decoded: list[str]) -> None:
    open_cache(open_folder(image_tree), 10, folder=folder)
    decoded.clear()
    open_cache(open_folder(image_tree), 11, folder=folder)
    assert len(decoded) == 54


def test_some_domains_take_their_images_from_the_whole(image_tree: Path, folder: Path, decoded: list[str]) -> None:
    whole = open_cache(open_folder(image_tree), 10, folder=folder)
    decoded.clear()
    subset = DomainSubset(open_folder(image_tree), ["indoor", "outdoor"])
    images = open_cache(subset, 10, folder=folder).gather(range(36))
    assert decoded == []
    assert images.equal(whole.gather([*range(18), *range(36, 54)]))


@pytest.mark.parametrize("damage", ["images", "hashes"])
def test_a_damaged_cache_is_no_source(image_tree: Path, folder: Path, tmp_path: Path, damage: str) -> None:
    first = open_cache(open_folder(image_tree), 10, folder=folder)
    (hashes,) = first.path.parent.glob("rows-*")
    os.truncate(first.path if damage == "images" else hashes, 300)
    paint(image_tree / "indoor" / "bird" / "00.png", (1, 2, 3))
    cache = open_cache(open_folder(image_tree), 10, folder=folder)
    assert cache.path.read_bytes() == fresh_bytes(image_tree, 10, tmp_path)


def test_a_cache_that_is_cut_while_it_is_copied_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hashes = make_cache(tmp_path / "old", [3, 4])
    monkeypatch.setattr(os, "pread", lambda *_: b"short")
    with (tmp_path / "new").open("wb") as stream:
        assert copy_cached_rows(stream.fileno(), rows, hashes, tmp_path).tolist() == [0, 1]


def test_a_cache_in_the_making_is_no_source(tmp_path: Path) -> None:
    rows, hashes = make_cache(tmp_path / ".half.tmp", [3, 4])
    with (tmp_path / "new").open("wb") as stream:
        assert copy_cached_rows(stream.fileno(), rows, hashes, tmp_path).tolist() == [0, 1]


def make_cache(place: Path, names: list[int]) -> tuple[Rows, np.ndarray]:
    """Write a cache of 2 × 2 grey images whose rows tell their names."""
    rows, hashes = Rows(len(names), 2, 1), hashes_of(names)
    place.mkdir(parents=True)
    (place / IMAGES).write_bytes(np.repeat(np.array(names, dtype=np.uint8), rows.row_bytes).tobytes())
    write_row_hashes(place, rows, hashes)
    return rows, hashes


def hashes_of(names: list[int]) -> np.ndarray:
    """Return hashes that share their first bytes by fours."""
    hashes = np.zeros((len(names), 32), dtype=np.uint8)
    hashes[:, 0], hashes[:, 31] = np.array(names, dtype=np.int64) // 4, names
    return hashes


NAMES = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(olds=st.lists(NAMES, max_size=3), wanted=NAMES, chunk=st.sampled_from([3, 4, 1 << 22]))
def test_each_row_is_the_wanted_one_or_left(
    olds: list[list[int]], wanted: list[int], chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("caches")
    for number, names in enumerate(olds):
        make_cache(place / str(number), names)
    rows = Rows(len(wanted), 2, 1)
    with pytest.MonkeyPatch.context() as patch, (place / "new").open("wb") as stream:
        patch.setattr(reuse, "CHUNK_BYTES", chunk)
        left = copy_cached_rows(stream.fileno(), rows, hashes_of(wanted), place).tolist()
    made = np.frombuffer((place / "new").read_bytes().ljust(4 * len(wanted), b"\xff"), dtype=np.uint8).reshape(-1, 4)
    known = {name for names in olds for name in names}
    assert all((made[i] == name).all() for i, name in enumerate(wanted) if i not in left)
    assert not (set(wanted) - known) & {name for i, name in enumerate(wanted) if i not in left}
    assert left == sorted(left)
    if all(name % 4 == 0 for names in [*olds, wanted] for name in names):  # no two share their first bytes
        assert {wanted[i] for i in left} == set(wanted) - known
