"""Download one file: several addresses in order, resumed where a former attempt broke off.

The bytes go to `FILE.part`, beside it `FILE.part.json` with what is needed to go on (address, validator); only a whole
file gets its name. A part is continued from the address that it came from, and only if the server says that its file is
still the same (`If-Range` with its ETag or Last-Modified, RFC 9110); anything else would be a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import cast

from qtdog.core.errors import DataError
from qtdog.core.files import clear_disk_errors, sha256_file, sync_folder, write_atomic
from qtdog.data.cards import Archive

CHUNK_BYTES = 1 << 20
ATTEMPTS = 4
"""How often one address is tried; an attempt that brought bytes does not count."""
PAUSE_S = 1.0
TIMEOUT_S = 60.0
"""Longest silence of a server."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
Bytes = Callable[[str, int, int | None], None]
"""Called as progress(file, bytes so far, bytes in all or None)."""


@dataclass(frozen=True)
class Downloaded:
    """What came of a download.

    Attributes:
        path: the whole file.
        url: where it came from.
        sha256: of its content.
        n_bytes: its size.
        n_saved: bytes that a former attempt had brought and that were not sent again.
    """

    path: Path
    url: str
    sha256: str
    n_bytes: int
    n_saved: int


@dataclass
class _Part:
    """The unfinished file, and what is known of its source."""

    path: Path
    url: str = ""
    validator: str = ""
    n_saved: int = 0

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def _note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def load(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(self._note.read_text())
            self.url, self.validator = str(note["url"]), str(note["validator"])

    def save(self) -> None:
        write_atomic(self._note, json.dumps({"url": self.url, "validator": self.validator}))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self.n_saved = 0

    def finish(self, target: Path) -> None:
        self.path.replace(target)
        self._note.unlink(missing_ok=True)
        sync_folder(target.parent)


def download(
    archive: Archive, folder: Path, *, sha256: str = "", progress: Bytes | None = None, timeout_s: float = TIMEOUT_S
) -> Downloaded:
    """Return the file of `archive` in `folder`, downloaded now unless it is there.

    Args:
        archive: names and addresses.
        folder: where it and its unfinished part go.
        sha256: what its content must hash to; "" if that is not known.
        progress: is told of the bytes.
        timeout_s: longest silence of a server.

    Raises:
        DataError: no address gave the file, or one of another content; the text has a line per address.
        RunError: the disk is full.
    """
    target = folder / archive.file
    failures: list[str] = []
    part = _Part(target.with_name(target.name + ".part"))
    part.load()
    if target.is_file():
        part.n_saved = target.stat().st_size
    # a part is worth most at its own address; sorting is stable, so that the others keep their order
    for url in sorted(archive.urls, key=lambda url: download_address(url) != part.url):
        with clear_disk_errors(target):
            reason = "" if target.is_file() else _fetch(download_address(url), part, progress, timeout_s)
        found = sha256_file(target) if target.is_file() and not reason else ""
        if found and sha256 in ("", found):
            return Downloaded(target, url, found, target.stat().st_size, part.n_saved)
        if found:
            target.unlink()
            part.n_saved = 0
            reason = f"the content has sha256 {found}, expected was {sha256}"
        failures.append(f"{url}: {reason}")
    listed = "\n  ".join(failures) or "it has no address"
    raise DataError(f"{archive.file} could not be downloaded:\n  {listed}")


def download_address(url: str) -> str:
    """Return the address that is really asked: `gdrive:ID` is a file on Google Drive.

    Example:
        >>> download_address("gdrive:abc")
        'https://drive.usercontent.google.com/download?id=abc&export=download&confirm=t'
    """
    kind, _, name = url.partition(":")
    if kind == "gdrive":
        return f"https://drive.usercontent.google.com/download?id={name}&export=download&confirm=t"
    return url


def _fetch(url: str, part: _Part, progress: Bytes | None, timeout_s: float) -> str:
    """Bring the file from one address, going on after broken connections; the reason if that failed."""
    reason, left = "", ATTEMPTS
    if part.url != url:
        part.discard()
        part.url, part.validator = url, ""
    while left:
        before = part.size
        try:
            _attempt(part, progress, timeout_s)
            part.finish(part.path.with_name(part.path.name.removesuffix(".part")))
            return ""
        except _Refused as error:
            return str(error)
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            reason = str(error) or type(error).__name__
        if part.size <= before:
            left -= 1
            time.sleep(PAUSE_S if left else 0)
    return reason


class _Refused(Exception):
    """The server's answer will not become better by asking again."""


class _Broken(HTTPException):
    """The connection ended too early."""


def _attempt(part: _Part, progress: Bytes | None, timeout_s: float) -> None:
    with _open(part, timeout_s) as response:
        start = _start(part, response)
        total = _total(response, start)
        part.validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        part.n_saved = max(part.n_saved, start) if start else 0
        part.save()
        _refuse_page(response)
        done = _copy(part, response, (start, total), progress)
    if total is not None and done != total:
        raise _Broken(f"the connection ended after {done:,} of {total:,} bytes")
    if total is None and progress is not None:
        progress(part.path.name.removesuffix(".part"), done, done)  # only now the size is known


def _open(part: _Part, timeout_s: float) -> HTTPResponse:
    try:
        request = urllib.request.Request(part.url, headers={"User-Agent": "qtdog", "Accept-Encoding": "identity"})
    except ValueError as error:
        raise _Refused(f"no address: {error}") from error
    # a weak validator promises no equal bytes
    if part.size and part.validator and not part.validator.startswith("W/"):
        request.add_header("Range", f"bytes={part.size}-")
        request.add_header("If-Range", part.validator)
    try:
        return cast(HTTPResponse, urllib.request.urlopen(request, timeout=timeout_s))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            part.discard()
            raise _Broken("the server has a shorter file") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(f"the server says {error.code} {error.reason}") from error
        raise _Refused(f"the server says {error.code} {error.reason}") from error


def _start(part: _Part, response: HTTPResponse) -> int:
    """Where the answer's bytes belong: behind the part if the server goes on there, else at the start."""
    given = response.headers.get("Content-Range", "")
    if response.status == 206 and given.startswith(f"bytes {part.size}-"):
        return part.size
    if response.status == 206:
        part.discard()
        raise _Broken(f"the server goes on elsewhere ({given})")
    return 0


def _total(response: HTTPResponse, start: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _refuse_page(response: HTTPResponse) -> None:
    if "text/html" in response.headers.get("Content-Type", ""):
        raise _Refused("the server sent a web page instead of the file (a quota, or a consent that it asks for)")


def _copy(part: _Part, response: HTTPResponse, place: tuple[int, int | None], progress: Bytes | None) -> int:
    done, total = place
    name = part.path.name.removesuffix(".part")
    with part.path.open("r+b" if done else "wb") as stream:
        stream.seek(done)
        stream.truncate()
        while chunk := response.read1(CHUNK_BYTES):
            stream.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(name, done, total)
        stream.flush()
        os.fsync(stream.fileno())
    return done


def download_record(found: Downloaded) -> dict[str, str | int]:
    """Return a download as JSON: file, url, sha256, n_bytes, n_saved."""
    told = asdict(found)
    return {"file": found.path.name} | {key: told[key] for key in ("url", "sha256", "n_bytes", "n_saved")}
