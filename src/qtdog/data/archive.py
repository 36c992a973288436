"""Unpack an archive that may be hostile: all is checked before anything is written.

Refused are names that leave the folder, links, devices, encrypted or repeated members, members that overlap, and
archives that would become too large: more than the disk holds, or more than `MAX_RATIO` times their own size (a bomb).
Modes, owners and times are not taken over.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import shutil
import stat
import tarfile
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
MAX_HEADER_BYTES = 1 << 20
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
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    gzip.BadGzipFile,
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
        if error.filename is not None or error.errno is not None:
            raise
        raise DataError(f"{path.name} is damaged: {error}") from error  # how bz2 says it
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
        bounded = _Bounded(plain, path.name, limit)
        archive = tarfile.TarFile(fileobj=cast(Any, bounded))

        def members() -> Iterator[ArchiveMember]:
            for info in archive:
                cast(Any, archive).members = []  # else tarfile keeps all of them in memory
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise DataError(f"{path.name} is refused: '{info.name}' is a link, a device or sparse")
                yield ArchiveMember(info.name, info.size, lambda info=info: _opened(archive, info))
            while bounded.read(CHUNK_BYTES):  # the checksum of the compression stands behind the end of the tar
                pass

        yield members


def _opened(archive: Any, info: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(info)
    assert stream is not None  # it is a regular file
    return stream


class _Bounded:
    """What tarfile reads from: neither one header nor the whole may grow beyond its limit."""

    def __init__(self, stream: IO[bytes], name: str, limit: int) -> None:
        self._stream, self._name = stream, name
        self._limit = limit + limit // 2 + SMALL_BYTES  # headers and padding come on top of the files

    def read(self, n: int = -1) -> bytes:
        if n < 0 or n > MAX_HEADER_BYTES:
            raise DataError(f"{self._name} is refused: a header of {n:,} bytes")
        self._check(self._stream.tell() + n)
        return self._stream.read(n)

    def seek(self, place: int, whence: int = 0) -> int:
        self._check(place)
        return self._stream.seek(place, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, place: int) -> None:
        if place > self._limit:
            raise DataError(f"{self._name} is refused: it would unpack to more than {self._limit:,} bytes")


def _check(path: Path, members: Iterator[ArchiveMember], limit: int) -> list[int]:
    """The declared sizes of all files, after everything that can be seen before writing was checked."""
    sizes: list[int] = []
    total, seen = 0, set[str]()
    for member in members:
        key = safe_member_name(member.name, path.name).casefold()
        if key in seen:
            raise DataError(f"{path.name} is refused: '{member.name}' is in it twice")
        seen.add(key)
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
