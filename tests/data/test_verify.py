import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtdog.core.config_io import build_config
from qtdog.core.errors import DataError
from qtdog.data.cards import PACS
from qtdog.data.image_folder import open_folder
from qtdog.data.splits import make_splits
from qtdog.data.verify import verify
from qtdog.training.protocol import check_trainable


def test_a_sound_data_set(image_tree: Path) -> None:
    report = verify(open_folder(image_tree))
    assert report.ok
    assert report.text() == "54 images: nothing wrong"


def test_unreadable_images_are_listed_with_the_reason(image_tree: Path) -> None:
    os.truncate(image_tree / "night" / "cat" / "3.png", 70)
    (image_tree / "night" / "dog" / "0.png").write_text("<html>")
    (image_tree / "indoor" / "dog" / "link.png").symlink_to(image_tree / "gone.png")
    report = verify(open_folder(image_tree))
    assert [key for key, _ in report.unreadable] == ["indoor/dog/link.png", "night/cat/3.png", "night/dog/0.png"]
    assert all(key in reason for key, reason in report.unreadable)
    assert not report.ok
    assert "unreadable images (--skip-unreadable trains without them): 3" in report.text()
    assert "qtdog data verify" not in report.text()  # who reads this has just done that


def test_classes_that_are_empty_or_missing_are_told_apart(image_tree: Path) -> None:
    (image_tree / "night" / "yak").mkdir()
    shutil.rmtree(image_tree / "outdoor" / "dog")
    report = verify(open_folder(image_tree))
    assert report.empty_classes == ["yak"]
    assert report.missing_classes == [("outdoor", "dog")]
    assert "dog in outdoor" in report.text()


def test_copies_are_listed_by_what_they_harm(image_tree: Path) -> None:
    source = image_tree / "night" / "cat" / "2.png"
    shutil.copy(source, image_tree / "night" / "cat" / "again.png")  # one may be trained on, the other held out
    report = verify(open_folder(image_tree))
    assert report.copies == [["night/cat/2.png", "night/cat/again.png"]]
    assert not report.ok
    assert (report.duplicates, report.conflicting_labels) == ([], [])
    shutil.copy(source, image_tree / "night" / "dog" / "other.png")
    report = verify(open_folder(image_tree))
    assert report.conflicting_labels == [["night/cat/2.png", "night/cat/again.png", "night/dog/other.png"]]
    assert (report.duplicates, report.copies) == ([], [])
    shutil.copy(source, image_tree / "indoor" / "dog" / "copy.png")
    report = verify(open_folder(image_tree))
    assert report.duplicates == report.conflicting_labels == [
        ["indoor/dog/copy.png", "night/cat/2.png", "night/cat/again.png", "night/dog/other.png"]
    ]  # fmt: skip


def test_images_that_look_the_same_are_listed_if_asked(image_tree: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    smooth.save(image_tree / "night" / "cat" / "x.png")
    smooth.save(image_tree / "indoor" / "cat" / "y.jpg", quality=97)
    assert verify(open_folder(image_tree)).ok
    report = verify(open_folder(image_tree), near=True)
    assert ["indoor/cat/y.jpg", "night/cat/x.png"] in report.near_duplicates


def test_verify_and_training_have_one_verdict(image_tree: Path) -> None:
    for name in ("bird", "dog"):
        for domain in ("indoor", "night", "outdoor"):
            shutil.rmtree(image_tree / domain / name)
    report = verify(open_folder(image_tree))
    assert report.obstacles == ["all images have the class 'cat': there is nothing to tell apart"]
    config = build_config([{"data": {"source": str(image_tree), "target": "night"}}])
    with pytest.raises(DataError, match="all images have the class 'cat'"):
        check_trainable(open_folder(image_tree), config.data)
    for i in range(2, 6):
        (image_tree / "night" / "cat" / f"{i}.png").unlink()
    (small,) = verify(open_folder(image_tree)).obstacles[1:]
    with pytest.raises(DataError) as caught:
        make_splits(open_folder(image_tree))
    assert str(caught.value) == small


def test_counts_are_compared_with_the_card(tmp_path: Path) -> None:
    for d, domain in enumerate(PACS.domains or ()):
        for c, name in enumerate(PACS.classes or ()):
            (tmp_path / domain / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (d * 40, c * 30, 0)).save(tmp_path / domain / name / "a.png")
    report = verify(open_folder(tmp_path))
    assert "domain sketch has 7 images, the dataset card says 3,929" in report.differences
    assert len(report.differences) == 4


def test_long_lists_are_cut_in_the_text_only(image_tree: Path) -> None:
    for path in image_tree.glob("*/*/*.png"):
        path.write_bytes(b"")
    report = verify(open_folder(image_tree))
    assert len(report.unreadable) == 54
    assert "… and 34 more" in report.text()
    assert len(asdict(report)["unreadable"]) == 54


def test_progress_is_reported(image_tree: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(open_folder(image_tree), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (54, 54)
