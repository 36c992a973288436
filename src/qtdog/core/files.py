"""Writing files and folders so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from qtdog.core.errors import RunError


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames inside the folder `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the content of the file `path` durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
}
_REFUSED = {
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the operation is not permitted",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "it is a folder",
    errno.EEXIST: "a file is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links lead back to themselves",
    errno.EIO: "the disk failed",
    errno.ESTALE: "the file server lost it",
    errno.ENOLCK: "the file system has no locks",
    errno.ENOSYS: "the file system cannot do that",
    errno.EOPNOTSUPP: "the file system cannot do that",
    errno.EMFILE: "this process has too many open files",
    errno.ENFILE: "the machine has too many open files",
}
"""What a place on a file system says, by error number, with room and without."""


@contextlib.contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and its kin into a RunError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        reason = (_FULL | _REFUSED).get(error.errno or 0)
        if reason is None:
            raise
        advice = "Free some space (or choose another folder) and start again; a training goes on with --resume."
        if error.errno not in _FULL:
            advice = "Choose another place, or mend this one, and start again."
        raise RunError(f"could not write {path}: {reason}. What was there before is unchanged. {advice}") from error


def place_sentence(error: OSError) -> str:
    """Return one sentence on what is wrong with the place that an error names; "" if the error is none of a place.

    Example:
        >>> place_sentence(OSError(errno.ENAMETOOLONG, "File name too long", "x"))
        'x: the name is too long'
        >>> place_sentence(OSError("anything else"))
        ''
    """
    reasons = _FULL | _REFUSED
    if error.filename is None:
        return f"a file could not be written: {reasons[error.errno]}" if error.errno in reasons else ""
    reasons = reasons | {errno.ENOENT: "there is no such file or folder"}
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else str(error.filename)
    return f"{name}: {reasons[error.errno]}" if error.errno in reasons else ""


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock_file(handle: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file without waiting; return whether its file system knows locks at all.

    Args:
        handle: the file's.
        shared: take a lock that others may share.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the lock cannot be taken for another reason.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def safe_name(text: str) -> str:
    """Return a name for a file or folder: the text itself where it is one, else a similar one, different for each text.

    Example:
        >>> safe_name("art_painting"), safe_name("..").startswith("_-"), safe_name("a/b") == safe_name("a_b")
        ('art_painting', True, False)
    """
    plain = re.sub(r"[/\\\x00-\x1f\ud800-\udfff]", "_", text).strip(" .")
    if plain and plain == text and len(text.encode(errors="surrogatepass")) <= MAX_NAME_BYTES:
        return text
    short = plain.encode(errors="ignore")[: MAX_NAME_BYTES // 2].decode(errors="ignore") or "_"
    return f"{short}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:12]}"


MAX_NAME_BYTES = 120


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` through a temporary file beside it and a rename.

    What is there and is no regular file (/dev/null, /dev/stdout, a pipe) is written into and stays what it is.

    Raises:
        RunError: the disk is full or not writable; the file that was there before is unchanged.
    """
    with atomic_stream(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_stream(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream whose content is at `path` when the block ends well; it does nothing else than `write_atomic`.

    Raises:
        RunError: the disk is full or not writable; the file that was there before is unchanged.
    """
    with clear_disk_errors(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as stream:
                yield stream
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        with _held(lambda: _new_file(path)) as (handle, temporary):
            with os.fdopen(os.dup(handle), "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
            sync_folder(path.parent)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, for what is to become it, and remove it at the end.

    Leftovers of processes that were killed at this are removed first.

    Raises:
        RunError: the disk is full or not writable.
    """
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        with _held(lambda: _new_folder(path)) as (_, temporary):
            yield temporary


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well; modes follow the umask.

    Everything in it is on the disk before it gets its name. If `path` came into being meanwhile (another process was
    faster) that one is kept and ours is dropped.

    Raises:
        RunError: the disk is full or not writable; nothing is left behind.
    """
    with temporary_folder(path) as temporary:
        yield temporary
        _settle(temporary)
        with contextlib.suppress(FileExistsError):
            _rename_unless_there(temporary, path)
        sync_folder(path.parent)


OLD, NEW = "old", "new"


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a folder to make, which takes the place of `path` when the block ends well.

    If anything fails, what was at `path` before is still there; a process that is killed between the two renames leaves
    it aside, and `remove_leftovers` puts it back. Everything is on the disk before it gets its name. Modes follow the
    umask.

    Raises:
        RunError: the disk is full or not writable.
    """
    with temporary_folder(path) as temporary:
        new, old = temporary / NEW, temporary / OLD
        yield new
        _settle(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        sync_folder(path.parent)


LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.tmp", re.DOTALL)
ABANDONED_S = 24 * 3600.0  # age from which a temporary file counts as left where the file system knows no locks


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove temporary files and folders of this module that their process, killed, could not remove.

    One whose process lives is locked by it, and stays. An old folder that was put aside to be replaced, and was not,
    gets its name back.

    Args:
        folder: where they lie.
        name: of the file or folder that they were to become; "" for all.
    """
    try:
        found = [(entry, match) for entry in folder.iterdir() if (match := LEFTOVER.fullmatch(entry.name))]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for entry, match in found:
        if name in ("", match["name"]):
            with contextlib.suppress(OSError):  # another process is at it, or it cannot be written
                _remove_leftover(entry, folder / match["name"])


def _remove_leftover(entry: Path, target: Path) -> None:
    if entry.is_symlink():
        entry.unlink()
        return
    is_folder = entry.is_dir()
    # NFS takes a lock on a file that is open for writing alone, and none on a folder
    handle = os.open(entry, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not _takes_lock(handle) and time.time() - entry.stat().st_mtime < ABANDONED_S:
            return
        if not is_folder:
            entry.unlink()
            return
        if (entry / OLD).is_dir() and not target.exists():
            (entry / OLD).rename(target)
            sync_folder(target.parent)
        shutil.rmtree(entry)
    finally:
        os.close(handle)


def _takes_lock(handle: int) -> bool:
    """Lock a file or folder; return whether its file system can (BlockingIOError: another process has it)."""
    try:
        return lock_file(handle)
    except BlockingIOError:
        raise
    except OSError:
        return False


@contextlib.contextmanager
def _held(make: Callable[[], tuple[int, Path]]) -> Iterator[tuple[int, Path]]:
    """Yield the handle and the path of a new temporary file or folder, locked; remove it at the end."""
    while True:
        handle, temporary = make()
        try:
            _takes_lock(handle)
            if os.fstat(handle).st_nlink and temporary.exists():
                break
        except BlockingIOError:  # another process takes it for a leftover at this very moment
            pass
        os.close(handle)
    try:
        yield handle, temporary
    finally:
        os.close(handle)
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _new_file(path: Path) -> tuple[int, Path]:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    return handle, Path(name)


def _new_folder(path: Path) -> tuple[int, Path]:
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        return os.open(temporary, os.O_RDONLY), temporary
    except BaseException:
        temporary.rmdir()
        raise


SYNC_ALL = 1000  # files from which the whole file system is synced at once


def _settle(folder: Path) -> None:
    """Make a new folder and all that is in it durable, with the modes that the umask gives."""
    mask = umask()
    folders = [Path(top) for top, _, _ in os.walk(folder)]
    files = [Path(top) / name for top, _, names in os.walk(folder) for name in names]
    for file in files:
        found = file.lstat()
        # a link, hard or symbolic, is somebody else's file too
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_mode & 0o777 != 0o666 & ~mask:
            file.chmod(0o666 & ~mask)
    for one in folders:
        one.chmod(0o777 & ~mask)
    if len(files) + len(folders) > SYNC_ALL:
        os.sync()
        return
    for file in files:
        if not file.is_symlink():
            sync_file(file)
    for one in reversed(folders):
        sync_folder(one)


def umask() -> int:
    """Return the permissions that this process's new files lack; reading it without setting it takes /proc."""
    try:
        with open("/proc/self/status") as stream:
            return next(int(line.split()[1], 8) for line in stream if line.startswith("Umask:"))
    except (OSError, StopIteration):
        mask = os.umask(0o022)
        os.umask(mask)
        return mask


def _rename_unless_there(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(path) from error
