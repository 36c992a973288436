import errno
import os
import subprocess
import sys

import pytest

from qtdog.core.errors import RunError
from qtdog.core.files import atomic_folder, remove_leftovers, replacing_folder, sha256_file, write_atomic


def test_write_replaces_whole_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from qtdog.core.errors import RunError
from qtdog.core.files import write_atomic

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
path = Path(sys.argv[1])
write_atomic(path, b"old")
try:
    write_atomic(path, b"x" * 5000)
except RunError as error:
    print(error)
"""


def test_refused_write_keeps_the_old_file_and_says_what_to_do(tmp_path):
    """The system refuses to write files beyond 1 kB, as a full disk would; in a process of its own."""
    path = tmp_path / "file.bin"
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True)
    assert "file.bin: the file-size limit is reached. What was there before is unchanged." in done.stdout
    assert "--resume" in done.stdout
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_full_disk_in_a_folder_leaves_nothing(tmp_path):
    def fill():
        with atomic_folder(tmp_path / "step") as temporary:
            (temporary / "a").write_text("a")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="the disk is full"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_folder_appears_whole_and_the_faster_process_wins(tmp_path):
    target = tmp_path / "cache"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("ours")
        assert not target.exists()
        target.mkdir()
        (target / "a").write_text("theirs")
    assert (target / "a").read_text() == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


def test_other_errors_pass_through(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "x"):
            raise OSError(errno.EBADF, "bad file descriptor")

    with pytest.raises(OSError, match="bad file descriptor"):
        fail()


def test_sha256_of_known_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", "x")
        with atomic_folder(tmp_path / "folder") as temporary:
            handle = os.open(temporary / "a", os.O_CREAT | os.O_WRONLY, 0o600)  # as safetensors does
            os.close(handle)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder", "folder/a")]
    assert modes == [0o666 & ~mask, 0o777 & ~mask, 0o666 & ~mask]


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "step"

    def write(content, error=None):
        with replacing_folder(path) as temporary:
            temporary.mkdir()
            (temporary / "a").write_text(content)
            assert not path.exists() or (path / "a").read_text() == "old"
            if error:
                raise error

    write("old")
    with pytest.raises(RunError, match="the disk is full"):
        write("half", OSError(errno.ENOSPC, "No space left on device"))
    assert (path / "a").read_text() == "old"
    write("new")
    assert (path / "a").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step"]


def leave(folder, name, *, is_folder=False):
    """Make what a killed process leaves of `name`."""
    path = folder / f".{name}.ab12_xyz.tmp"
    path.mkdir() if is_folder else path.write_text("half")
    if is_folder:
        (path / "new").mkdir()
        (path / "new" / "part").write_text("half")
    return path


def test_what_a_kill_left_is_removed_by_the_next_write_of_that_name(tmp_path):
    for name in ("a", "b"):
        leave(tmp_path, name)
    write_atomic(tmp_path / "a", "whole")
    assert sorted(os.listdir(tmp_path)) == [".b.ab12_xyz.tmp", "a"]
    leave(tmp_path, "c", is_folder=True)
    with atomic_folder(tmp_path / "c") as temporary:
        (temporary / "d").write_text("")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]


def test_what_a_living_process_writes_stays(tmp_path):
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "b").write_text("")
        remove_leftovers(tmp_path)
        subprocess.run([sys.executable, "-c", REMOVE, tmp_path], check=True)
        assert (temporary / "b").is_file()
    assert (tmp_path / "a" / "b").is_file()
    assert os.listdir(tmp_path) == ["a"]


REMOVE = (
    "import sys, pathlib; from qtdog.core.files import remove_leftovers; remove_leftovers(pathlib.Path(sys.argv[1]))"
)


def test_files_of_others_are_no_leftovers(tmp_path):
    (tmp_path / "secret").write_text("")
    (tmp_path / ".a.ab12_xyz.tmp").symlink_to(tmp_path / "secret")
    for name in ("a.tmp", ".a.tmp", ".a.short.tmp", ".hidden"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == [".a.short.tmp", ".a.tmp", ".hidden", "a.tmp", "secret"]


def test_a_folder_that_was_put_aside_gets_its_name_back(tmp_path):
    left = leave(tmp_path, "run", is_folder=True)
    (left / "old").mkdir()
    (left / "old" / "weights").write_text("whole")
    remove_leftovers(tmp_path, "run")
    assert os.listdir(tmp_path) == ["run"]
    assert (tmp_path / "run" / "weights").read_text() == "whole"


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_modes_deep_in_a_new_folder_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", "a")
        for make, name in ((atomic_folder, "one"), (replacing_folder, "two")):
            with make(tmp_path / name) as folder:
                (folder / "below").mkdir(parents=True)
                (folder / "below" / "a").write_text("")
                (folder / "below" / "a").chmod(0o600)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_the_mode_of_a_file_that_others_have_too_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    (tmp_path / "mine").chmod(0o600)
    with atomic_folder(tmp_path / "linked") as folder:
        os.link(tmp_path / "mine", folder / "mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600


def test_all_is_on_the_disk_before_a_folder_gets_its_name(tmp_path, monkeypatch):
    order = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: order.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle)
    )
    monkeypatch.setattr(os, "rename", lambda *names: order.append("rename") or rename(*names))
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "b" / "c").mkdir(parents=True)
        (folder / "b" / "c" / "file").write_text("")
    synced = [os.path.relpath(path, folder) for path in order[: order.index("rename")]]
    assert synced == ["b/c/file", "b/c", "b", "."]
