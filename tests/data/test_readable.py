"""Unreadable images are left out on demand, by name."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from qtdog.core.errors import DataError
from qtdog.data.dataset import DomainSubset, require_images
from qtdog.data.image_folder import FileDataset, open_folder
from qtdog.data.known_datasets import RotatedDigits
from qtdog.data.open import without_unreadable


def test_the_broken_ones_are_left_out_and_told(image_tree, tmp_path):
    os.truncate(image_tree / "night" / "cat" / "3.png", 70)
    (image_tree / "indoor" / "dog" / "0.png").write_text("<html>")
    (image_tree / "indoor" / "dog" / "x.png").symlink_to("nowhere.png")
    whole = open_folder(image_tree)
    kept = without_unreadable(whole, folder=tmp_path / "c")
    assert [key for key, _ in kept.skipped] == ["indoor/dog/0.png", "indoor/dog/x.png", "night/cat/3.png"]
    assert all("--skip-unreadable" not in reason for _, reason in kept.skipped)
    assert len(kept) == 52
    assert kept.domains == whole.domains
    assert kept.card == whole.card
    for i in (0, 20, 51):
        j = whole.keys.index(kept.keys[i])
        assert np.array_equal(require_images(kept).read(i), whole.read(j))
        assert kept.class_index[i] == whole.class_index[j]
        assert kept.domain_index[i] == whole.domain_index[j]


def test_a_sound_data_set_is_returned_as_it_is(image_tree, tmp_path):
    whole = open_folder(image_tree)
    assert without_unreadable(whole, folder=tmp_path / "c") is whole
    digits = RotatedDigits()
    assert without_unreadable(digits, folder=tmp_path / "c") is digits


def test_what_was_found_is_remembered_until_something_changes(image_tree, tmp_path, monkeypatch):
    def look():
        dataset = open_folder(image_tree)
        return without_unreadable(dataset, folder=tmp_path / "c", settled_ns=-(10**18))

    path = image_tree / "night" / "cat" / "3.png"
    good = path.read_bytes()
    os.truncate(path, 70)
    first = look()
    with monkeypatch.context() as patch:
        patch.setattr(FileDataset, "read", lambda *_: pytest.fail("read again"))
        assert look().skipped == first.skipped
    path.write_bytes(good)
    assert len(look()) == 54


def test_nothing_readable_is_an_error(image_tree, tmp_path):
    for path in image_tree.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image of photos can be read; the first: "):
        without_unreadable(open_folder(image_tree), folder=tmp_path / "c")


def test_the_skipped_of_a_part_are_still_told(image_tree, tmp_path):
    os.truncate(image_tree / "night" / "cat" / "3.png", 70)
    kept = without_unreadable(open_folder(image_tree), folder=tmp_path / "c")
    assert DomainSubset(require_images(kept), ["indoor"]).skipped == kept.skipped


def test_a_failure_of_the_machine_is_no_unreadable_image(image_tree, tmp_path, monkeypatch):
    inner, failing = os.open, str(image_tree / "night" / "cat" / "3.png")

    def fail(path, *args, **options):
        if str(path) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return inner(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(DataError, match="Input/output error"):
            without_unreadable(open_folder(image_tree), folder=tmp_path / "c", settled_ns=-(10**18))
    whole = open_folder(image_tree)
    assert without_unreadable(whole, folder=tmp_path / "c", settled_ns=-(10**18)) is whole
