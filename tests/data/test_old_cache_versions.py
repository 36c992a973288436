"""The disk holds one decoded version of a data set, and no reader loses the one that it reads."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
from PIL import Image

from qtdog.data.dataset import DomainSubset
from qtdog.data.decoded_cache import IMAGES, DecodedCache, open_cache
from qtdog.data.image_folder import open_folder, open_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def change(image_tree: Path, red: int) -> None:
    Image.new("RGB", (20, 24), (red, 8, 7)).save(image_tree / "night" / "cat" / "2.png")


def places(folder: Path) -> set[Path]:
    return {images.parent for images in folder.glob(f"decoded/*/{IMAGES}")}


def decode(image_tree: Path, folder: Path, size: int = 10) -> Path:
    """Decode, close, and return where the cache lies."""
    place = open_cache(open_folder(image_tree), size, folder=folder).path.parent
    gc.collect()
    return place


def test_an_older_version_is_removed_when_the_newer_one_is_there(image_tree: Path, folder: Path) -> None:
    for red in range(3):
        change(image_tree, red)
        new = decode(image_tree, folder)
        assert set((folder / "decoded").iterdir()) == {new}


def test_a_version_that_is_read_stays_and_goes_with_the_next(image_tree: Path, folder: Path) -> None:
    reader: DecodedCache | None = open_cache(open_folder(image_tree), 10, folder=folder)
    assert reader is not None
    old = reader.path.parent
    expected = reader.gather(range(54))
    change(image_tree, 1)
    new = decode(image_tree, folder)
    assert places(folder) == {old, new}
    assert reader.gather(range(54)).equal(expected)
    reader = None
    change(image_tree, 2)
    new = decode(image_tree, folder)
    assert places(folder) == {new}


def test_other_sizes_domains_lists_and_folders_stay(image_tree: Path, folder: Path, tmp_path: Path) -> None:
    (image_tree / "list.csv").write_text("path,class,domain\nnight/cat/2.png,cat,night\nindoor/cat/0.png,cat,indoor\n")
    shutil.copytree(image_tree, tmp_path / "copy" / "photos")
    change(tmp_path / "copy" / "photos", 9)
    others = [
        decode(image_tree, folder, size=11),
        decode(tmp_path / "copy" / "photos", folder),
        open_cache(DomainSubset(open_folder(image_tree), ["night", "indoor"]), 10, folder=folder).path.parent,
        open_cache(open_manifest(image_tree / "list.csv"), 10, folder=folder).path.parent,
    ]
    gc.collect()
    old = decode(image_tree, folder)
    change(image_tree, 1)
    new = decode(image_tree, folder)
    assert places(folder) == {*others, new}
    assert old not in places(folder)


def test_one_that_cannot_be_removed_does_no_harm(
    image_tree: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = decode(image_tree, folder)
    change(image_tree, 1)

    def refuse(path: Path, **_: object) -> None:
        if path == old:
            raise PermissionError(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    new = decode(image_tree, folder)
    assert places(folder) == {old, new}


def test_a_version_in_the_making_is_left_alone(image_tree: Path, folder: Path) -> None:
    old = decode(image_tree, folder)
    shutil.copytree(old, half := old.parent / ".half.tmp")
    change(image_tree, 1)
    decode(image_tree, folder)
    assert half.is_dir()
    assert not old.exists()
