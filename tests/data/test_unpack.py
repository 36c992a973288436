"""Archives, sound and hostile: nothing is written outside, and nothing at all of a refused one."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.errors import DataError
from qtdog.data import archive as module
from qtdog.data.archive import is_archive, safe_member_name, unpack

FILES = {"a/b.txt": b"one", "a/c/d.bin": bytes(range(256)) * 20, "e": b""}


def tree(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def hostile_tar() -> Callable[..., bytes]:
    """Return a function: attributes of one more member behind a sound one → a tar archive."""

    def make(name: str = "x", content: bytes = b"", **attributes: Any) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            sound = tarfile.TarInfo("sound.txt")
            sound.size = 2
            archive.addfile(sound, io.BytesIO(b"ok"))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
        return stream.getvalue()

    return make


def hostile_zip(name: str, content: bytes = b"x", mode: int = 0, again: str = "") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sound.txt", "ok")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, content, zipfile.ZIP_DEFLATED)
        if again:
            archive.writestr(again, b"again")
    return stream.getvalue()


def refuse(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    """Unpack in a folder of its own and look that nothing at all was written."""
    place = tmp_path / "in" / "side"
    place.mkdir(parents=True)
    (place / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        unpack(place / file, place / "out")
    assert tree(tmp_path) == {f"in/side/{file}": content}
    assert not (place / "out").exists()


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar"])
def test_files_come_out_as_they_were(tmp_path, packers, kind):
    (tmp_path / f"x.{kind}").write_bytes(packers[kind](FILES))
    seen: list[tuple[int, int]] = []
    n = unpack(tmp_path / f"x.{kind}", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert (n, tree(tmp_path / "out"), seen[-1]) == (3, FILES, (3, 3))


@pytest.mark.parametrize(("suffix", "mode"), [("tar.bz2", "w:bz2"), ("tar.xz", "w:xz"), ("tgz", "w:gz")])
def test_other_compressions(tmp_path, suffix, mode):
    with tarfile.open(tmp_path / f"x.{suffix}", mode) as archive:
        (tmp_path / "one").write_bytes(b"1" * 5000)
        archive.add(tmp_path / "one", "deep/one")
    unpack(tmp_path / f"x.{suffix}", tmp_path / "out")
    assert tree(tmp_path / "out") == {"deep/one": b"1" * 5000}


def test_modes_are_not_taken_over_and_junk_is_left_out(tmp_path, hostile_tar):
    (tmp_path / "x.tar.gz").write_bytes(hostile_tar("tool", b"#!", mode=0o4777))
    unpack(tmp_path / "x.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out" / "tool").stat().st_mode & 0o7111
    (tmp_path / "m.zip").write_bytes(hostile_zip("__MACOSX/._a", again=".DS_Store"))
    unpack(tmp_path / "m.zip", tmp_path / "mac")
    assert list(tree(tmp_path / "mac")) == ["sound.txt"]


NAMES = ["../out.txt", "a/../../out.txt", "/etc/x", "..\\out.txt", "C:/x", "a" * 300, "b/" * 600 + "x"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_leave_the_folder_are_refused(tmp_path, hostile_tar, name):
    refuse(tmp_path / "zip", "x.zip", hostile_zip(name), "leaves the folder or is none")
    refuse(tmp_path / "tar", "x.tar.gz", hostile_tar(name), "leaves the folder or is none")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, hostile_tar, kind):
    content = hostile_tar("link", type=kind, linkname="/etc/passwd")
    refuse(tmp_path, "x.tar.gz", content, "'link' is a link, a device or sparse")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip_are_refused(tmp_path, mode):
    refuse(tmp_path, "x.zip", hostile_zip("link", b"/etc/passwd", mode | 0o777), "'link' is a link or a device")


@pytest.mark.parametrize("again", ["sound.txt", "./sound.txt", "SOUND.TXT"])
def test_a_name_that_is_there_twice_is_refused(tmp_path, again):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "_writecheck", lambda *_: None)
        content = hostile_zip("x", again=again)
    refuse(tmp_path, "x.zip", content, "is in it twice")


def test_bombs_are_refused_before_anything_is_written(tmp_path, hostile_tar, monkeypatch):
    monkeypatch.setattr(module, "SMALL_BYTES", 1 << 16)
    bomb = bytes(8 << 20)
    refuse(tmp_path / "zip", "x.zip", hostile_zip("bomb", bomb), "a decompression bomb")
    refuse(tmp_path / "tar", "x.tar.gz", hostile_tar("bomb", bomb), "bomb|would unpack to more than")


def test_a_tar_that_only_claims_to_be_huge_is_refused(tmp_path):
    info = tarfile.TarInfo("huge")
    info.size = 1 << 45
    refuse(tmp_path, "x.tar", info.tobuf(), "bomb|would unpack to more than")


def test_a_header_as_a_bomb_is_refused(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 40 << 20
    refuse(tmp_path, "x.tar", info.tobuf() + bytes(1024), "a header of [0-9,]+ bytes")


def test_members_that_overlap_are_refused(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i in range(50):
            archive.writestr(f"{i}", os.urandom(200))
        first = archive.infolist()[0]
        for info in archive.infolist():
            info.header_offset, info.compress_size = first.header_offset, 3000
    refuse(tmp_path, "x.zip", stream.getvalue(), "its members overlap|damaged")


def test_an_encrypted_member_is_refused(tmp_path):
    content = bytearray(hostile_zip("x"))
    at = content.rfind(b"PK\x01\x02")
    content[at + 8] |= 1
    refuse(tmp_path, "x.zip", bytes(content), "is encrypted")


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch, packers):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 100))  # type: ignore[attr-defined]
    refuse(tmp_path, "x.zip", packers["zip"](FILES), "only 0.00 GB are free there")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar"])
def test_a_cut_archive_is_damaged(tmp_path, packers, kind):
    whole = packers[kind]({"a": os.urandom(5000)})
    for n in (0, 10, len(whole) // 2):
        (tmp_path / f"x.{kind}").write_bytes(whole[:n])
        with pytest.raises(DataError, match=rf"x\.{kind} is damaged"):
            unpack(tmp_path / f"x.{kind}", tmp_path / "out" / str(n))


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_flipped_bit_is_noticed(tmp_path, packers, kind):
    content = bytearray(packers[kind]({"a": os.urandom(5000)}))
    content[len(content) // 2] ^= 16
    (tmp_path / f"x.{kind}").write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        unpack(tmp_path / f"x.{kind}", tmp_path / "out")


def test_a_member_longer_than_declared_is_refused(tmp_path):
    content = bytearray(hostile_zip("x", b"y" * 5000))
    at = content.rfind(b"PK\x01\x02")
    content[at + 24 : at + 28] = (100).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"larger than the archive declares|damaged"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


@given(st.text(max_size=60))
def test_a_name_is_safe_or_refused(name):
    try:
        path = Path("/base", safe_member_name(name))
    except DataError:
        return
    assert os.path.normpath(path).startswith("/base/")


def test_what_is_no_archive_is_known():
    assert [is_archive(name) for name in ("a.ZIP", "a.tar.xz", "a.gz", "a.txt")] == [True, True, False, False]


def tar_header(name, size=0, kind=b"0"):
    header = bytearray(512)
    header[: len(name)] = name
    header[124:136] = b"%011o\0" % size
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def zip_of(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 100)
    return bytearray(stream.getvalue())


def far_offset():
    content = zip_of("a", "b")
    struct.pack_into("<I", content, content.index(b"PK\1\2") + 42, 0xFFFFFFF0)
    return content


def negative_place():
    content = zip_of("a")
    struct.pack_into("<I", content, content.index(b"PK\5\6") + 16, 0xFFFF)
    return content


PAX_A = b"9 path=a\n" + bytes(503)
END = bytes(1024)
BAD_ARCHIVES = {
    "a file that is a folder too.zip": (zip_of("a", "a/b"), "as a file and as a folder"),
    "a folder that is a file too.zip": (zip_of("a/b", "A"), "as a file and as a folder"),
    "a far offset.zip": (far_offset(), "damaged"),
    "a negative place.zip": (negative_place(), "damaged"),
    "headers of headers.tar": ((tar_header(b"p", 9, b"x") + PAX_A) * 1500 + tar_header(b"ok") + END, "another header"),
    "a large header.tar": (
        tar_header(b"p", 65537, b"x") + bytes(66048) + tar_header(b"ok") + END,
        "a header of 65,537",
    ),
    "digits.tar": (tar_header(b"p", 199, b"x") + b"9" * 199 + bytes(313) + tar_header(b"ok") + END, "no records"),
    "a negative length.tar": (tar_header(b"p", 9, b"x") + b"-9 path=a\n".ljust(512, b"\0") + END, "no records"),
    "a size that is none.tar": (
        tar_header(b"p", 12, b"x") + b"12 size=1e9\n".ljust(512, b"\0") + tar_header(b"ok") + END,
        "the size '1e9'",
    ),
    "sparse.tar": (
        tar_header(b"p", 22, b"x") + b"22 GNU.sparse.major=1\n".ljust(512, b"\0") + tar_header(b"ok") + END,
        "is sparse",
    ),
    "a global name.tar": (tar_header(b"p", 9, b"g") + PAX_A + tar_header(b"ok") + END, "names its files"),
    "a link.tar": (tar_header(b"ok", 0, b"2") + END, "is a link"),
    "a header alone.tar": (tar_header(b"p", 9, b"x") + PAX_A + END, "ends in the middle"),
    "half a header.tar": (tar_header(b"ok") + bytes(100), "ends in the middle"),
    "a missing end of a file.tar": (tar_header(b"ok", 9999) + bytes(512), "ends in the middle|shorter"),
    "nothing.tar": (b"", "no tar archive"),
    "another checksum.tar": (tar_header(b"ok").replace(b"ok", b"no") + END, "checksum"),
}


@pytest.mark.parametrize(("name", "content", "reason"), [(name, *case) for name, case in BAD_ARCHIVES.items()])
def test_a_bad_archive_is_one_line(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        unpack(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(form, tmp_path):
    names = ["a", "b/" + "c" * 90 + "/" + "d" * 99, "e/ä€", "f/empty", *(f"g/{i}" for i in range(20))]
    names += [] if form == tarfile.USTAR_FORMAT else ["h" * 200 + "/" + "i" * 200 + "/j"]
    with tarfile.open(tmp_path / "x.tar", "w", format=form, pax_headers={"comment": "all"}) as archive:
        folder = tarfile.TarInfo("g")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for n, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name.endswith("empty") else 700 * n + 1
            info.mtime = 1.5
            archive.addfile(info, io.BytesIO(bytes([n]) * info.size))
    assert unpack(tmp_path / "x.tar", tmp_path / "out") == len(names)
    for n, name in enumerate(names):
        content = (tmp_path / "out" / name).read_bytes()
        assert content == (b"" if name.endswith("empty") else bytes([n]) * (700 * n + 1))
