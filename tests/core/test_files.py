import errno
import os
import subprocess
import sys

import pytest

from qtdog.core.errors import RunError
from qtdog.core.files import atomic_folder, replacing_folder, sha256_file, write_atomic


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
