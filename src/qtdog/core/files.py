"""Writing files and folders so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


@contextlib.contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" and its kin into a RunError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        reasons |= {errno.EROFS: "the disk is read-only", errno.EACCES: "permission denied"}
        reasons |= {errno.EFBIG: "the file-size limit is reached", errno.EPERM: "the operation is not permitted"}
        reasons |= {errno.ENOTDIR: "a part of the path is a file", errno.EEXIST: "a file is in the way"}
        reasons |= {errno.ENAMETOOLONG: "the name is too long", errno.EIO: "the disk failed"}
        if error.errno not in reasons:
            raise
        text = f"could not write {path}: {reasons[error.errno]}. What was there before is unchanged."
        raise RunError(f"{text} Free some space (or choose another folder) and start again with --resume.") from error


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

    Raises:
        RunError: the disk is full or not writable; the file that was there before is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~umask())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well; modes follow the umask.

    If `path` came into being meanwhile (another process was faster) that one is kept and ours is dropped.

    Raises:
        RunError: the disk is full or not writable; nothing is left behind.
    """
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            _settle(temporary)
            with contextlib.suppress(FileExistsError):
                _rename_unless_there(temporary, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a folder to make, which takes the place of `path` when the block ends well.

    If anything fails, what was at `path` before is still there. Modes follow the umask.

    Raises:
        RunError: the disk is full or not writable.
    """
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            new, old = temporary / "new", temporary / "old"
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
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Make a new folder and the files in it durable, with the modes that the umask gives."""
    for file in filter(Path.is_file, folder.iterdir()):
        file.chmod(0o666 & ~umask())
        sync_file(file)
    folder.chmod(0o777 & ~umask())
    sync_folder(folder)


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
