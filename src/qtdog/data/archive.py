"""Unpack an archive that may be hostile: all is checked before anything is written.

Refused are names that leave the folder, links, devices, encrypted or repeated members, members that overlap, and
archives that would become too large: more than the disk holds, or more than `MAX_RATIO` times their own size (a bomb).
Modes, owners and times are not taken over.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import io
import lzma
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from qtdog.core.errors import DataError
from qtdog.core.files import clear_disk_errors
from qtdog.core.progress import Progress

MAX_RATIO = 200
"""Images do not shrink; lists in JSON and CSV shrink to a tenth or less."""
SMALL_BYTES = 64 << 20
"""Below this an archive may have any ratio."""
MAX_MEMBERS = 5_000_000
MAX_NAME = 1000
MAX_HEADER_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20
JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db")

TAR_READERS: dict[str, Callable[[Path], Any]] = {
    ".tar": io.FileIO,
    ".tar.gz": gzip.GzipFile,
    ".tgz": gzip.GzipFile,
    ".tar.bz2": bz2.BZ2File,
    ".tar.xz": lzma.LZMAFile,
}
BROKEN = (
    zipfile.BadZipFile,
    NotImplementedError,  # a compression that zipfile does not know
    zlib.error,
    lzma.LZMAError,
    EOFError,
    gzip.BadGzipFile,
    # what zipfile raises where it trusts what it reads
    struct.error,
    ValueError,
    LookupError,
    OverflowError,
    RuntimeError,
)


class ArchiveMember(NamedTuple):
    """One file of an archive: its name, its declared size, and how to open it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def is_archive(name: str) -> bool:
    """Return whether a file name is that of an archive that `unpack` knows.

    Example:
        >>> is_archive("a.tar.gz"), is_archive("a.csv")
        (True, False)
    """
    return name.lower().endswith((".zip", *TAR_READERS))


def unpack(path: Path, folder: Path, progress: Progress = None) -> int:
    """Unpack an archive into `folder`, which is made, and return the number of files.

    Raises:
        DataError: the archive is damaged, refused, or too large for the disk. What was written until then is of a
            damaged archive only: the caller drops the folder.
        RunError: the disk is full.
    """
    limit = max(SMALL_BYTES, MAX_RATIO * path.stat().st_size)
    try:
        with _members(path, limit) as members:
            sizes = _check(path, members(), limit)
        _require_space(folder, sum(sizes))
        with _members(path, limit) as members, clear_disk_errors(folder):
            _write_all(members(), folder, len(sizes), progress)
    except BROKEN as error:
        raise DataError(f"{path.name} is damaged: {str(error) or type(error).__name__}") from error
    except OSError as error:
        if error.filename is not None or error.errno not in (None, errno.EINVAL):
            raise
        # how bz2 says it, and what seeking to a place before the beginning gives
        raise DataError(f"{path.name} is damaged: {error}") from error
    return len(sizes)


def _members(path: Path, limit: int) -> contextlib.AbstractContextManager[Callable[[], Iterator[ArchiveMember]]]:
    if path.name.lower().endswith(".zip"):
        return _zip_members(path)
    suffix = next(suffix for suffix in TAR_READERS if path.name.lower().endswith(suffix))
    return _tar_members(path, TAR_READERS[suffix], limit)


@contextlib.contextmanager
def _zip_members(path: Path) -> Iterator[Callable[[], Iterator[ArchiveMember]]]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if sum(info.compress_size for info in infos) > path.stat().st_size:
            raise DataError(f"{path.name} is refused: its members overlap")

        def members() -> Iterator[ArchiveMember]:
            for info in infos:
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise DataError(f"{path.name} is refused: '{info.filename}' is a link or a device")
                if info.flag_bits & 1:
                    raise DataError(f"{path.name} is refused: '{info.filename}' is encrypted")
                if not info.is_dir():
                    yield ArchiveMember(info.filename, info.file_size, lambda info=info: archive.open(info))

        yield members


@contextlib.contextmanager
def _tar_members(
    path: Path, reader: Callable[[Path], Any], limit: int
) -> Iterator[Callable[[], Iterator[ArchiveMember]]]:
    with reader(path) as plain:
        yield lambda: read_tar(_Bounded(plain, path.name, limit), path.name)


class _Bounded:
    """A stream that is read from front to back, and not beyond a limit."""

    def __init__(self, stream: IO[bytes], name: str, limit: int) -> None:
        self._stream, self._name = stream, name
        self._limit = limit + limit // 2 + SMALL_BYTES  # headers and padding come on top of the files

    def read(self, n: int) -> bytes:
        if self._stream.tell() + n > self._limit:
            raise DataError(f"{self._name} is refused: it would unpack to more than {self._limit:,} bytes")
        return self._stream.read(n)

    def exactly(self, n: int) -> bytes:
        data = self.read(n)
        if len(data) < n:
            raise DataError(f"{self._name} is damaged: it ends in the middle")
        return data

    def skip(self, n: int) -> None:
        if n > 0:
            place = self._stream.tell() + n - 1
            if place >= self._limit:
                raise DataError(f"{self._name} is refused: it would unpack to more than {self._limit:,} bytes")
            self._stream.seek(place)
            self.exactly(1)


BLOCK = 512
MEMBERS = (b"0", b"\0", b"7", b"5")
OLD, FOLDER = MEMBERS[1], MEMBERS[3]
EXTENSIONS = (b"x", b"g", b"L", b"K")
PAX, PAX_GLOBAL, LONG_NAME, _ = EXTENSIONS


def read_tar(stream: _Bounded, archive: str) -> Iterator[ArchiveMember]:
    """Yield the files of a tar archive (v7, ustar, GNU or pax), each to be read before the next one is asked for.

    Not the standard library's: that one follows headers of headers recursively, and before Python 3.11.10 takes square
    time and more for some of 200 bytes. Here a header may take 64 kB, and the one behind it must be of a file.

    Raises:
        DataError: the archive is damaged, or has a member that is no file or folder.
    """
    extended = _Extended(archive)
    begun = False
    while len(block := stream.read(BLOCK)) == BLOCK and any(block):
        begun = True
        kind, name, size = _tar_header(block, archive)
        if kind in EXTENSIONS:
            extended.add(kind, size, stream)
            continue
        name, size = extended.take(name, size)
        if kind not in MEMBERS:
            raise DataError(f"{archive} is refused: '{name}' is a link, a device or sparse")
        # the first tar had no kind for folders: their names end in a slash
        if kind == FOLDER or (kind == OLD and name.endswith("/")):
            stream.skip(size + -size % BLOCK)
            continue
        part = _TarPart(stream, size)
        yield ArchiveMember(name, size, lambda part=part: cast(IO[bytes], part))
        stream.skip(part.left + -size % BLOCK)
    if not begun or extended.of or 0 < len(block) < BLOCK:
        raise DataError(f"{archive} is damaged: it ends in the middle, or is no tar archive")
    while stream.read(CHUNK_BYTES):  # the checksum of the compression stands behind the end of the tar
        pass


class _Extended:
    """What headers before that of a member say of it."""

    def __init__(self, archive: str) -> None:
        self._archive = archive
        self.of: dict[bytes, dict[str, str]] = {}  # by kind of the header

    def add(self, kind: bytes, size: int, stream: _Bounded) -> None:
        if size > MAX_HEADER_BYTES or kind in self.of:
            raise DataError(f"{self._archive} is refused: a header of {size:,} bytes, or of another header")
        content = stream.exactly(size)
        stream.skip(-size % BLOCK)
        is_pax = kind in (PAX, PAX_GLOBAL)
        records = _pax_records(content, self._archive) if is_pax else {"path": _tar_text(content)}
        if kind == PAX_GLOBAL:
            if records.keys() & {"path", "size", "linkpath"}:
                raise DataError(f"{self._archive} is refused: a global header that names its files")
        else:
            self.of[kind] = records

    def take(self, name: str, size: int) -> tuple[str, int]:
        """Return name and size of the member whose header comes now, and forget the rest."""
        pax = self.of.get(PAX, {})
        if any(key.startswith("GNU.sparse") for key in pax):
            raise DataError(f"{self._archive} is refused: '{name}' is sparse")
        name = pax.get("path", self.of.get(LONG_NAME, {}).get("path", name))
        size = _pax_size(pax["size"], self._archive) if "size" in pax else size
        self.of = {}
        return name, size


class _TarPart:
    """The content of one member."""

    def __init__(self, stream: _Bounded, size: int) -> None:
        self._stream, self.left = stream, size

    def read(self, n: int) -> bytes:
        data = self._stream.read(min(n, self.left))
        self.left -= len(data)
        return data

    def __enter__(self) -> _TarPart:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _tar_header(block: bytes, archive: str) -> tuple[bytes, str, int]:
    """Return kind, name and size; the sum of the bytes, the checksum's own as blanks, must be what it says."""
    expected = _tar_number(block[148:156], archive)
    signed = sum(byte - 256 * (byte > 127) for byte in block[:148] + block[156:]) + 256
    if expected not in (sum(block[:148]) + sum(block[156:]) + 256, signed):
        raise DataError(f"{archive} is damaged: a header has another checksum, or it is no tar archive")
    name = _tar_text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_tar_text(block[345:500])}/{name}"
    return block[156:157], name, _tar_number(block[124:136], archive)


def _tar_number(field: bytes, archive: str) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    if text.strip(b"01234567"):
        raise DataError(f"{archive} is damaged: a header has the number {text!r}")
    return int(text or b"0", 8)


def _tar_text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(content: bytes, archive: str) -> dict[str, str]:
    """Return the records of a pax header: each is its own length, a blank, KEY=VALUE and a line end."""
    records: dict[str, str] = {}
    place = 0
    while place < len(content) and content[place]:
        digits = content[place : place + 7].split(b" ")[0]
        end = place + int(digits) if digits.isdigit() and len(digits) < 7 else 0
        record = content[place + len(digits) + 1 : end]
        key, equals, value = record.partition(b"=")
        if end <= place or end > len(content) or not equals or record[-1:] != b"\n":
            raise DataError(f"{archive} is damaged: a pax header has no records")
        records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        place = end
    return records


def _pax_size(text: str, archive: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise DataError(f"{archive} is damaged: a pax header has the size '{text[:40]}'")
    return int(text)


def _check(path: Path, members: Iterator[ArchiveMember], limit: int) -> list[int]:
    """The declared sizes of all files, after everything that can be seen before writing was checked."""
    sizes: list[int] = []
    total, seen, folders = 0, set[str](), set[str]()
    for member in members:
        key = safe_member_name(member.name, path.name).casefold()
        if key in seen:
            raise DataError(f"{path.name} is refused: '{member.name}' is in it twice")
        seen.add(key)
        above = {parent.as_posix() for parent in PurePosixPath(key).parents}
        folders |= above
        if key in folders or not seen.isdisjoint(above):
            raise DataError(f"{path.name} is refused: '{member.name}' is in it as a file and as a folder")
        sizes.append(member.size)
        total += member.size
        if total > limit:
            raise DataError(
                f"{path.name} is refused: it has {path.stat().st_size:,} bytes and would unpack to more than {limit:,} "
                "(a decompression bomb)"
            )
        if len(sizes) > MAX_MEMBERS:
            raise DataError(f"{path.name} is refused: it has more than {MAX_MEMBERS:,} files")
    return sizes


def safe_member_name(name: str, archive: str = "the archive") -> str:
    """Return a member's relative path, with forward slashes.

    Raises:
        DataError: it would leave the folder, or is no name.

    Example:
        >>> safe_member_name("./photos/a.jpg")
        'photos/a.jpg'
    """
    path = PurePosixPath(name.replace("\\", "/"))
    bad = path.is_absolute() or ".." in path.parts or ":" in (path.parts or ("",))[0] or "\0" in name
    too_long = len(name) > MAX_NAME or any(len(part.encode(errors="replace")) > 255 for part in path.parts)
    if bad or too_long or not path.parts:
        raise DataError(f"{archive} is refused: the name '{name[:100]}' leaves the folder or is none")
    return path.as_posix()


def _require_space(folder: Path, n_bytes: int) -> None:
    existing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if n_bytes > free:
        raise DataError(
            f"{n_bytes / 1e9:,.2f} GB are needed in {existing}, but only {free / 1e9:,.2f} GB are free there"
        )


def _write_all(members: Iterator[ArchiveMember], folder: Path, n: int, progress: Progress) -> None:
    for done, member in enumerate(members, start=1):
        _write(member, folder)
        if progress is not None and (done % 100 == 0 or done == n):
            progress(done, n)


def _write(member: ArchiveMember, folder: Path) -> None:
    name = safe_member_name(member.name)
    if any(part in JUNK or part.startswith("._") for part in PurePosixPath(name).parts):
        return
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with member.open() as source, target.open("xb") as stream:
        while chunk := source.read(CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise DataError(f"'{member.name}' is larger than the archive declares")
            stream.write(chunk)
    if left:
        raise DataError(f"'{member.name}' is shorter than the archive declares")
