import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtdog.core.errors import DataError, RunError
from qtdog.data.decode import decode_resized
from qtdog.data.decoded_cache import IMAGES, DecodedCache, cache_root, content_sha256, open_cache
from qtdog.data.file_index import load_index
from qtdog.data.image_folder import FileDataset, open_folder
from qtdog.data.known_datasets import RotatedDigits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    for name in ("read_resized", "read_hashed"):
        monkeypatch.setattr(FileDataset, name, refuse)


OLD = -(10**18)  # as `settled_ns`: as if the files had been written long ago, so that hashes are remembered


def built(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"decoded/*/{IMAGES}"))


def test_rows_are_the_resized_images(image_tree: Path, folder: Path) -> None:
    dataset = open_folder(image_tree)
    images = open_cache(dataset, 10, folder=folder).gather([53, 0, 0, 7])
    assert images.shape == (4, 10, 10, 3)
    for row, i in zip(images.numpy(), [53, 0, 0, 7], strict=True):
        assert np.array_equal(row, decode_resized(dataset.path(i), 10))


def test_grey_images(folder: Path) -> None:
    digits = RotatedDigits()
    images = open_cache(digits, 28, folder=folder).gather(np.array([3, 1796]))
    assert np.array_equal(images.numpy(), np.stack([digits.read(3), digits.read(1796)]))


def test_it_is_built_once_and_shared(image_tree: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    first = open_cache(open_folder(image_tree), 10, folder=folder)
    request.getfixturevalue("no_decoding")
    second = open_cache(open_folder(image_tree), 10, folder=folder)
    assert second.path == first.path
    assert not list(folder.glob("decoded/.*"))


def test_a_copy_elsewhere_shares_it(image_tree: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    first = open_cache(open_folder(image_tree), 10, folder=folder)
    shutil.copytree(image_tree, image_tree.parent / "copy")
    request.getfixturevalue("no_decoding")
    assert open_cache(open_folder(image_tree.parent / "copy"), 10, folder=folder).path == first.path


def test_size_makes_another_one(image_tree: Path, folder: Path) -> None:
    dataset = open_folder(image_tree)
    assert open_cache(dataset, 10, folder=folder).path != open_cache(dataset, 11, folder=folder).path


def test_a_changed_image_makes_a_new_one(image_tree: Path, folder: Path) -> None:
    dataset = open_folder(image_tree)
    before = open_cache(dataset, 10, folder=folder, settled_ns=OLD)
    Image.new("RGB", (20, 24), (9, 8, 7)).save(dataset.path(4))
    after = open_cache(open_folder(image_tree), 10, folder=folder, settled_ns=OLD)
    assert after.path != before.path
    assert after.gather([4]).reshape(-1, 3).unique(dim=0).tolist() == [[9, 8, 7]]


def test_an_unchanged_data_set_is_not_hashed_again(
    image_tree: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content_sha256(open_folder(image_tree), folder=folder, settled_ns=OLD)
    monkeypatch.setattr(FileDataset, "sample_sha256", lambda *_: pytest.fail("hashed again"))
    assert content_sha256(open_folder(image_tree), folder=folder) == first


def test_a_file_written_just_now_is_hashed_again(image_tree: Path, folder: Path) -> None:
    """Two writes within one tick of the file system's clock, of the same size, leave the same times."""
    content_sha256(open_folder(image_tree), folder=folder)
    (place,) = folder.glob("index/*")
    assert load_index(place).paths == []


@pytest.mark.parametrize("n_bytes", [0, 100, 54 * 300 - 1, 54 * 300 + 1])
def test_a_cache_of_the_wrong_size_is_rebuilt(image_tree: Path, folder: Path, n_bytes: int) -> None:
    dataset = open_folder(image_tree)
    expected = open_cache(dataset, 10, folder=folder).gather(range(54))
    os.truncate(built(folder)[0], n_bytes)
    assert open_cache(dataset, 10, folder=folder).gather(range(54)).equal(expected)


def test_a_cache_cut_short_under_a_reader_is_named(image_tree: Path, folder: Path) -> None:
    cache = open_cache(open_folder(image_tree), 10, folder=folder)
    os.truncate(cache.path, 1000)
    with pytest.raises(DataError, match="was cut short; start again and it is rebuilt"):
        cache.gather([50])


@pytest.mark.parametrize("index", [-1, 54])
def test_an_index_out_of_range_is_refused(image_tree: Path, folder: Path, index: int) -> None:
    with pytest.raises(IndexError, match="of 54"):
        open_cache(open_folder(image_tree), 10, folder=folder).gather([index])


def test_one_unreadable_image_is_named_and_nothing_left_behind(image_tree: Path, folder: Path) -> None:
    dataset = open_folder(image_tree)
    os.truncate(dataset.path(17), 60)
    with pytest.raises(DataError, match=rf"{dataset.keys[17]} cannot be read as an image"):
        open_cache(dataset, 10, folder=folder)
    assert not list(folder.glob("decoded/*"))
    assert not list(folder.glob("decoded/.*"))


def test_at_most_twenty_unreadable_images_are_listed(image_tree: Path, folder: Path) -> None:
    dataset = open_folder(image_tree)
    for i in range(30):
        os.truncate(dataset.path(i), 60)
    with pytest.raises(DataError, match="at least 20 images cannot be read") as caught:
        open_cache(dataset, 10, folder=folder)
    assert len(str(caught.value).splitlines()) == 21


def test_a_disk_too_small_is_said_before_anything_is_written(
    image_tree: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 12_000))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"needs 0\.02 MB in .*cache, but only 0\.01 MB are free.*QTDOG_CACHE"):
        open_cache(open_folder(image_tree), 10, folder=folder)
    assert not list(folder.glob("decoded/*"))


def test_a_disk_that_fills_while_writing_leaves_nothing(
    image_tree: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match="the disk is full"):
        open_cache(open_folder(image_tree), 10, folder=folder)
    assert not list(folder.glob("decoded/*"))
    assert not list(folder.glob("decoded/.*"))


def test_two_builders_at_once_end_with_one_cache(image_tree: Path, folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(lambda _: open_cache(open_folder(image_tree), 10, folder=folder), range(2)))
    assert caches[0].gather(range(54)).equal(caches[1].gather(range(54)))
    assert len(built(folder)) == 1


def test_progress_is_reported_to_the_end(image_tree: Path, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_cache(open_folder(image_tree), 10, folder=folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (54, 54)


def test_where_caches_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QTDOG_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("QTDOG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "qtdog"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "qtdog"


def test_closing_gives_the_file_handle_back(image_tree: Path, folder: Path) -> None:
    cache: DecodedCache | None = open_cache(open_folder(image_tree), 10, folder=folder)
    n_open = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("needs /proc")
    cache = None
    assert len(os.listdir("/proc/self/fd")) == n_open - 1
    assert cache is None


def test_what_is_decoded_is_what_was_hashed(image_tree, folder, monkeypatch):
    dataset = open_folder(image_tree)
    path, inner = dataset.path(4), FileDataset.read_hashed

    def replaced_meanwhile(self, i, *how):
        if i == 4:
            Image.new("RGB", (20, 24), (9, 8, 7)).save(path)
        return inner(self, i, *how)

    monkeypatch.setattr(FileDataset, "read_hashed", replaced_meanwhile)
    with pytest.raises(DataError, match=r"the image indoor/.*/4\.png changed while the data set was read"):
        open_cache(dataset, 10, folder=folder)
    monkeypatch.undo()
    images = open_cache(open_folder(image_tree), 10, folder=folder).gather([4])
    assert images.reshape(-1, 3).unique(dim=0).tolist() == [[9, 8, 7]]


def test_a_file_replaced_within_its_times_is_seen(image_tree, folder):
    first = content_sha256(open_folder(image_tree), folder=folder)
    path = open_folder(image_tree).path(4)
    stat, content = path.stat(), path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert content_sha256(open_folder(image_tree), folder=folder) != first
