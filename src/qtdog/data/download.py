"""Download one file: several addresses in order, resumed where a former attempt broke off.

The bytes go to `FILE.part`, beside it `FILE.part.json` with what is needed to go on (address, validator); only a whole
file gets its name. A part is continued from the address that it came from, and only if the server says that its file is
still the same (`If-Range` with its ETag or Last-Modified, RFC 9110); anything else would be a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, cast

from qtdog.core.errors import DataError, RunError
from qtdog.core.files import clear_disk_errors, sha256_file, sync_folder, write_atomic
from qtdog.core.safe_text import read_json
from qtdog.data.cards import Archive

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0
MAX_REDIRECTIONS = 10


@dataclass(frozen=True)
class Limits:
    """What is expected of a server.

    Attributes:
        timeout_s: longest silence, and longest time until the headers are there.
        attempts: how often one address is tried; an attempt that brought a good part of the file does not count.
        good_bytes: such a part; a twentieth of the file is one too.
        reconnects: how often one address is tried in all.
        pause_s: between two attempts that brought nothing.
        slow_bytes_per_s: a server that sends less in `slow_s` is left.
        slow_s: seconds over which the speed is measured.
    """

    timeout_s: float = TIMEOUT_S
    attempts: int = 4
    good_bytes: int = 1 << 20
    reconnects: int = 1000
    pause_s: float = 1.0
    slow_bytes_per_s: float = 1000.0
    slow_s: float = 60.0


LIMITS = Limits()

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
    total: int | None = None
    n_saved: int = 0

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def _note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def load(self) -> None:
        with contextlib.suppress(RunError, KeyError, TypeError, IndexError):
            note = read_json(self._note, max_bytes=1 << 16)
            self.url, self.validator = str(note["url"]), str(note["validator"])
            self.total = note["total"] if isinstance(note.get("total"), int) else None

    def save(self) -> None:
        write_atomic(self._note, json.dumps({"url": self.url, "validator": self.validator, "total": self.total}))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self.n_saved, self.validator, self.total = 0, "", None

    def finish(self, target: Path) -> None:
        self.path.replace(target)
        self._note.unlink(missing_ok=True)
        sync_folder(target.parent)


def download(
    archive: Archive, folder: Path, *, sha256: str = "", progress: Bytes | None = None, limits: Limits | None = None
) -> Downloaded:
    """Return the file of `archive` in `folder`, downloaded now unless it is there.

    Args:
        archive: names and addresses.
        folder: where it and its unfinished part go.
        sha256: what its content must hash to; "" if that is not known.
        progress: is called with the bytes.
        limits: of what is waited for; default `LIMITS`.

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
            wanted = _Wanted(archive.max_bytes, limits or LIMITS, progress)
            reason = "" if target.is_file() else _fetch(download_address(url), part, wanted)
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


@dataclass(frozen=True)
class _Wanted:
    """What is asked of every attempt."""

    max_bytes: int
    limits: Limits
    progress: Bytes | None


def _fetch(url: str, part: _Part, wanted: _Wanted) -> str:
    """Bring the file from one address, going on after broken connections; the reason if that failed."""
    limits, reason, left = wanted.limits, "", wanted.limits.attempts
    if part.url != url:
        part.discard()
        part.url = url
    for _ in range(limits.reconnects):
        before = part.size
        try:
            _attempt(part, wanted)
            part.finish(part.path.with_name(part.path.name.removesuffix(".part")))
            return ""
        except _Refused as error:
            return str(error)
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            reason = str(error) or type(error).__name__
        good = limits.good_bytes if part.total is None else min(limits.good_bytes, part.total // 20)
        if part.size - before < max(1, good):
            left -= 1
            time.sleep(limits.pause_s if left else 0)
        if not left:
            break
    return reason


class _Refused(Exception):
    """The server's answer will not become better by asking again."""


class _Broken(HTTPException):
    """The connection ended too early."""


def _attempt(part: _Part, wanted: _Wanted) -> None:
    with _open(part, wanted.limits.timeout_s) as response:
        start, total = _place(part, response)
        if total is not None and total > wanted.max_bytes:
            raise _Refused(f"the file has {total:,} bytes, and at most {wanted.max_bytes:,} are expected")
        part.total = total
        part.validator = _validator(response)
        part.n_saved = max(part.n_saved, start) if start else 0
        part.save()
        _refuse_page(response)
        done = _copy(part, response, (start, total), wanted)
    if total is not None and done != total:
        raise _Broken(f"the connection ended after {done:,} of {total:,} bytes")
    if not done:  # headers that were cut off look like this too
        raise _Broken("the connection ended before the first byte")
    if total is None and wanted.progress is not None:
        wanted.progress(part.path.name.removesuffix(".part"), done, done)  # only now the size is known


def _validator(response: HTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows a few redirections, from https to https alone."""

    max_redirections = MAX_REDIRECTIONS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme != "https"):
            raise _Refused(f"the server sends on to {newurl[:200]!r}, which is no safe address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Deadline:
    """Ends a connection whose headers take too long: the timeout of a socket is for one silence, not for all."""

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._sockets: list[socket.socket] = []
        self.is_over = False

    def note(self, found: socket.socket) -> None:
        self._sockets.append(found)

    def _end(self) -> None:
        self.is_over = True
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    """Return what opens http and https addresses, and no others: no files of this machine, no ftp."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            deadline.note(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            deadline.note(self.sock)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> HTTPResponse:
            return cast(HTTPResponse, self.do_open(Plain, req))

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> HTTPResponse:
            return cast(HTTPResponse, self.do_open(Secure, req))

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        PlainHandler(),
        SecureHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirections(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _request(part: _Part) -> urllib.request.Request:
    try:
        request = urllib.request.Request(part.url, headers={"User-Agent": "qtdog", "Accept-Encoding": "identity"})
    except ValueError as error:
        raise _Refused(f"no address: {error}") from error
    if request.type not in ("http", "https"):
        raise _Refused(f"no address: files are downloaded by http and https, not by '{request.type}'")
    # a weak validator promises no equal bytes
    if part.size and part.validator and not part.validator.startswith("W/"):
        request.add_header("Range", f"bytes={part.size}-")
        request.add_header("If-Range", part.validator)
    return request


def _open(part: _Part, timeout_s: float) -> HTTPResponse:
    request = _request(part)
    try:
        with _Deadline(2 * timeout_s) as deadline:
            found = _opener(deadline).open(request, timeout=timeout_s)
        if found is None:
            raise _Refused("the server's answer is none")
        if deadline.is_over:  # what came until then may look like all of the headers
            raise _Broken("the server took too long for its headers")
        return cast(HTTPResponse, found)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            part.discard()
            raise _Broken("the server has a shorter file") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(f"the server says {error.code} {error.reason}") from error
        raise _Refused(f"the server says {error.code} {error.reason}") from error
    except ValueError as error:  # a header that is none, among others
        raise _Refused(f"the server's answer cannot be read: {error}") from error


_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


def _place(part: _Part, response: HTTPResponse) -> tuple[int, int | None]:
    """Return where the answer's bytes belong, and how long the file is: behind the part if the server goes on there."""
    length = _length(response)
    if response.status == 200:
        return 0, length
    if response.status != 206:
        raise _Refused(f"the server says {response.status}, and sends no file")
    given = response.headers.get("Content-Range", "")
    match = _RANGE.fullmatch(given.strip())
    first, last, total = (-1, -1, "") if match is None else (int(match[1]), int(match[2]), match[3])
    is_next = first == part.size > 0 and last >= first and length in (None, last - first + 1)
    whole = part.total if total == "*" else int(total or 0)
    same = whole is not None and last < whole and part.total in (None, whole)
    if not is_next or not same or (_validator(response) or part.validator) != part.validator:
        part.discard()
        raise _Broken(f"the server goes on elsewhere, or with another file ({given[:80]!r})")
    return first, whole


def _length(response: HTTPResponse) -> int | None:
    """Return how many bytes the answer has; None if the server does not say."""
    lengths = set(response.headers.get_all("Content-Length", []))
    if not lengths or response.headers.get("Transfer-Encoding"):
        return None
    (first, *others) = lengths
    if others or not (first.isascii() and first.isdigit() and len(first) < 19):
        raise _Refused(f"the server's Content-Length is {', '.join(sorted(lengths))[:80]!r}")
    return int(first)


def _refuse_page(response: HTTPResponse) -> None:
    if "text/html" in response.headers.get("Content-Type", ""):
        raise _Refused("the server sent a web page instead of the file (a quota, or a consent that it asks for)")
    if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", ""):
        raise _Refused("the server sent the file compressed, which was not asked for")


def _copy(part: _Part, response: HTTPResponse, place: tuple[int, int | None], wanted: _Wanted) -> int:
    done, total = place
    name = part.path.name.removesuffix(".part")
    limits, since, before = wanted.limits, time.monotonic(), done
    with part.path.open("r+b" if done else "wb") as stream:
        stream.seek(done)
        stream.truncate()
        while chunk := response.read1(CHUNK_BYTES):
            stream.write(chunk)
            done += len(chunk)
            if done > wanted.max_bytes:
                raise _Refused(f"the server sends more than the {wanted.max_bytes:,} bytes that are expected")
            if wanted.progress is not None:
                wanted.progress(name, done, total)
            if (passed := time.monotonic() - since) > limits.slow_s:
                if done - before < limits.slow_bytes_per_s * passed:
                    raise _Broken(f"the server sends less than {limits.slow_bytes_per_s:,.0f} bytes per second")
                since, before = time.monotonic(), done
        stream.flush()
        os.fsync(stream.fileno())
    return done


def download_record(found: Downloaded) -> dict[str, str | int]:
    """Return a download as JSON: file, url, sha256, n_bytes, n_saved."""
    fields = asdict(found)
    return {"file": found.path.name} | {key: fields[key] for key in ("url", "sha256", "n_bytes", "n_saved")}
