"""Hashes of many files are remembered, each by itself."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtdog.core.errors import DataError
from qtdog.core.files import sha256_file
from qtdog.data.dataset import DomainSubset
from qtdog.data.decoded_cache import content_sha256
from qtdog.data.file_index import file_hashes, load_index
from qtdog.data.image_folder import FileDataset, open_folder

OLD = -(10**18)  # as `settled_ns`: as if the files had been written long ago


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note which files are hashed."""
    seen: list[str] = []
    original = FileDataset.sample_sha256

    def noting(self: FileDataset, i: int) -> str:
        seen.append(self.keys[i])
        return original(self, i)

    monkeypatch.setattr(FileDataset, "sample_sha256", noting)
    return seen


def content(root: Path, folder: Path, **options: Any) -> str:
    """Return the content of a folder, all of whose files count as old."""
    return content_sha256(open_folder(root), folder=folder, settled_ns=OLD, **options)


def test_each_file_is_hashed_once(image_tree, tmp_path, hashed):
    first = content(image_tree, tmp_path / "c")
    assert sorted(hashed) == sorted(open_folder(image_tree).keys)
    del hashed[:]
    assert content(image_tree, tmp_path / "c") == first == open_folder(image_tree).content_sha256(hashes=None)
    del hashed[:]
    content(image_tree, tmp_path / "c")
    assert hashed == []


def test_only_what_changed_is_hashed_again(image_tree, tmp_path, hashed):
    first = content(image_tree, tmp_path / "c")
    del hashed[:]
    (image_tree / "night" / "cat" / "0.png").write_bytes(b"changed")
    (image_tree / "night" / "cat" / "new.png").write_bytes(b"new")
    (image_tree / "night" / "dog" / "0.png").unlink()
    (image_tree / "indoor" / "dog" / "0.png").rename(image_tree / "indoor" / "dog" / "moved.png")
    second = content(image_tree, tmp_path / "c")
    assert sorted(hashed) == ["indoor/dog/moved.png", "night/cat/0.png", "night/cat/new.png"]
    assert second != first
    assert second == open_folder(image_tree).content_sha256()
    del hashed[:]
    assert content(image_tree, tmp_path / "c") == second
    assert hashed == []


def test_a_file_of_the_same_size_and_time_of_writing_is_noticed(image_tree, tmp_path, hashed):
    path = image_tree / "night" / "cat" / "0.png"
    first, stat = content(image_tree, tmp_path / "c"), path.stat()
    time.sleep(0.02)
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content(image_tree, tmp_path / "c") != first


def test_a_file_written_just_now_is_not_remembered(image_tree, tmp_path):
    content_sha256(open_folder(image_tree), folder=tmp_path / "c")
    (place,) = (tmp_path / "c" / "index").iterdir()
    assert load_index(place).paths == []


def test_some_domains_ask_for_no_file_of_the_others_and_keep_their_hashes(image_tree, tmp_path, hashed):
    content_sha256(DomainSubset(open_folder(image_tree), ["night"]), folder=tmp_path / "c", settled_ns=OLD)
    assert {key.split("/")[0] for key in hashed} == {"night"}
    content(image_tree, tmp_path / "c")
    assert len(hashed) == 54
    content_sha256(DomainSubset(open_folder(image_tree), ["indoor"]), folder=tmp_path / "c", settled_ns=OLD)
    assert len(hashed) == 54


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04nonsense", b"\x93NUMPY"])
def test_a_damaged_index_is_made_anew(image_tree, tmp_path, hashed, damage):
    first = content(image_tree, tmp_path / "c")
    (place,) = (tmp_path / "c" / "index").iterdir()
    place.write_bytes(damage)
    assert content(image_tree, tmp_path / "c") == first
    assert len(load_index(place).paths) == 54


def test_an_index_whose_parts_do_not_fit_is_made_anew(tmp_path):
    np.savez(
        tmp_path / "i.npz",
        names=np.frombuffer(b"a\0b", dtype=np.uint8),
        stats=np.zeros((1, 3), dtype=np.int64),
        hashes=np.zeros((2, 32), dtype=np.uint8),
    )
    assert load_index(tmp_path / "i.npz").paths == []


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        file_hashes(str(tmp_path), ["gone.png"], lambda _: [], tmp_path)


def test_names_with_strange_letters_come_back(tmp_path, hashed):
    names = [os.fsdecode(b"\xff.png"), "ü 1.png", "line\nbreak.png"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode(errors="surrogateescape"))
    root, cache = str(tmp_path), tmp_path / "c"
    found = file_hashes(
        root, names, lambda rows: [sha256_file(tmp_path / names[i]) for i in rows], cache, settled_ns=OLD
    )
    again = file_hashes(root, names, refuse, cache, settled_ns=OLD)
    assert np.array_equal(found, again)


def refuse(rows: Any) -> list[str]:
    """Hash nothing: all files should be known."""
    pytest.fail("read again")


def tree_of_names(root: Path, n: int) -> list[str]:
    """Return n·n names of one file."""
    (root / "file").write_bytes(b"content")
    for i in range(n):
        (root / str(i)).mkdir()
    return [f"{i}/../{j}/../file" for i in range(n) for j in range(n)]


def numbered(rows: Any) -> Iterator[str]:
    """Give each row a hash of its own."""
    return (f"{row:064x}" for row in rows)


@pytest.mark.parametrize("asked", ["reversed", "half", "half and a new one"])
def test_hashes_belong_to_their_files_in_any_order(tmp_path, asked):
    names = tree_of_names(tmp_path, 12)
    root, cache = str(tmp_path), tmp_path / "c"
    first = file_hashes(root, names, numbered, cache, settled_ns=OLD)
    chosen = list(range(len(names)))[:: 2 if "half" in asked else -1]
    new = ["file"] if "new" in asked else []
    hash_rows = (lambda rows: ["f" * 64 for _ in rows]) if new else refuse
    found = file_hashes(root, [names[i] for i in chosen] + new, hash_rows, cache, settled_ns=OLD)
    assert np.array_equal(found[: len(chosen)], first[chosen])
    assert np.array_equal(file_hashes(root, names, refuse, cache, settled_ns=OLD), first)  # the others are kept


@pytest.mark.parametrize("what", ["first", "same", "one more"])
def test_a_start_takes_little_memory(tmp_path, what):
    names = tree_of_names(tmp_path, 100)
    root, cache, n_paths = str(tmp_path), tmp_path / "c", sum(len(f"{tmp_path}/{name}") for name in names)
    if what != "first":
        file_hashes(root, names[what == "one more" :], numbered, cache, settled_ns=OLD)
    tracemalloc.start()
    file_hashes(root, names, numbered, cache, settled_ns=OLD)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n_paths + 200 * len(names)  # it took 330 to 1,180 bytes per file beside the paths
