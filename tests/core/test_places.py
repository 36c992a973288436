"""Locks where there are none, names that no folder can have, and disks that fail: one sentence each."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtdog.cli import main as main_module
from qtdog.core.errors import FolderInUseError, RunError
from qtdog.core.files import clear_disk_errors, lock_file, safe_name, write_atomic
from qtdog.runs.folder import RunFolder


def refuse_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_usable(tmp_path, monkeypatch, code):
    refuse_locks(monkeypatch, code)
    with (tmp_path / "x").open("w") as stream:
        assert not lock_file(stream.fileno())
    with RunFolder(tmp_path / "run").lock():
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EIO])
def test_a_lock_that_fails_for_another_reason_is_one_sentence_with_the_folder(tmp_path, monkeypatch, code):
    refuse_locks(monkeypatch, code)
    with pytest.raises(RunError, match=f"could not write {tmp_path}/run: "), RunFolder(tmp_path / "run").lock():
        pass


def test_without_locks_a_living_process_holds_its_folder(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.ENOLCK)
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / "run" / ".lock").write_text(f"{other.pid}\n")
        with pytest.raises(FolderInUseError, match=f"process {other.pid}"), RunFolder(tmp_path / "run").lock():
            pass
        other.communicate(b"\n")
    with RunFolder(tmp_path / "run").lock():
        pass


@pytest.mark.parametrize(
    "code", [errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EIO, errno.ENAMETOOLONG]
)
def test_what_a_place_refuses_is_one_sentence_with_the_path(tmp_path, code):
    with pytest.raises(RunError, match=r"could not write .*/here: ") as caught, clear_disk_errors(tmp_path / "here"):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ENOLCK])
def test_what_no_command_expected_of_a_place_is_one_sentence(monkeypatch, capsys, code):
    def refuse(_: object) -> None:
        raise OSError(code, os.strerror(code), "/some/where")

    monkeypatch.setattr(sys, "argv", ["qtdog", "--version"])
    monkeypatch.setattr(main_module, "app", refuse)
    with pytest.raises(SystemExit) as caught:
        main_module.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: /some/where: ")


def test_an_error_of_the_program_keeps_its_trace(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qtdog", "--version"])
    monkeypatch.setattr(main_module, "app", lambda _: (_ for _ in ()).throw(OSError("a mistake")))
    with pytest.raises(OSError, match="a mistake"):
        main_module.main()


def test_a_device_or_pipe_is_written_into_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(tmp_path / "pipe", "answer")
    assert os.read(reader, 100) == b"answer"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    write_atomic(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(RunError, match="/dev/full: the disk is full"):
        write_atomic(Path("/dev/full"), "x" * 100_000)


def test_a_cache_that_is_a_file_is_said(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(RunError, match=r"could not write .*cache/a/b: a (part of the path is a )?file"):
        write_atomic(tmp_path / "cache" / "a" / "b", "x")


@given(st.lists(st.text(max_size=300), min_size=2, max_size=6, unique=True))
def test_safe_names_are_single_short_and_unique(texts):
    names = [safe_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    for name in names:
        assert name not in ("", ".", "..")
        assert "/" not in name
        assert "\0" not in name
        assert len(name.encode()) < 200


@pytest.mark.parametrize("name", ["art_painting", "0", "Straße 東京 #1", "location_38", "a.b", "x & y"])
def test_ordinary_names_stay(name):
    assert safe_name(name) == name
