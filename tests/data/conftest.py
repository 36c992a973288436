"""A local server that serves files well and badly, cards whose files it serves, and the program itself."""

from __future__ import annotations

import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qtdog.cli.main import main
from qtdog.data import download as downloading
from qtdog.data.cards import CARDS, Archive, DatasetCard

MADE = runpy.run_path(str(Path(__file__).with_name("small_archives.py")))


@dataclass
class Served:
    """One file of the server.

    Attributes:
        content: its bytes.
        ends_after: each answer breaks off after so many bytes; the last one holds for good, None is never.
        pause_s: before each 100 bytes.
        ranges: whether it can go on in the middle.
        etag: its version.
        kind: the content type.
        status: of every answer.
        moved_to: where it went.
        sized: whether the length is announced.
    """

    content: bytes = b""
    ends_after: list[int | None] = field(default_factory=list)
    pause_s: float = 0.0
    ranges: bool = True
    etag: str = '"1"'
    kind: str = "application/octet-stream"
    status: int = 200
    moved_to: str = ""
    sized: bool = True


class Server:
    """Serves `files` on loopback, and remembers what was asked for and sent."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.asked: list[tuple[str, str]] = []
        self.n_sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/{name}"

    def add(self, name: str, content: bytes, **how: Any) -> str:
        self.files[name] = Served(content, **how)
        return self.url(name)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        file = self.files.get(request.path[1:], Served(status=404))
        wanted = request.headers.get("Range", "")
        self.asked.append((request.path[1:], wanted))
        start, status = 0, file.status
        if file.moved_to:
            request.send_response(302)
            request.send_header("Location", file.moved_to)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if wanted and file.ranges and request.headers.get("If-Range") == file.etag:
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
        if start > len(file.content):
            request.send_error(416)
            return
        request.send_response(status)
        if file.sized:
            request.send_header("Content-Length", str(len(file.content) - start))
        request.send_header("Content-Type", file.kind)
        request.send_header("ETag", file.etag)
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{len(file.content) - 1}/{len(file.content)}")
        request.end_headers()
        self._send(request, file, start)

    def _send(self, request: BaseHTTPRequestHandler, file: Served, start: int) -> None:
        end = file.ends_after[0] if file.ends_after else None
        if len(file.ends_after) > 1:
            file.ends_after.pop(0)
        body = file.content[start : None if end is None else start + end]
        try:
            for i in range(0, len(body), 100 if file.pause_s else len(body) or 1):
                time.sleep(file.pause_s)
                part = body[i : i + 100] if file.pause_s else body
                self.n_sent += len(part)  # before the other side can have read it
                request.wfile.write(part)
        except OSError:
            pass  # the other side went away
        request.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloading, "LIMITS", downloading.Limits(pause_s=0.0))
    served = Server()
    yield served
    served.close()


@pytest.fixture
def packers() -> dict[str, Callable[[dict[str, bytes]], bytes]]:
    return {"zip": MADE["zip_of"], "tar.gz": MADE["tar_of"], "tar": lambda files: MADE["tar_of"](files, "w")}


@pytest.fixture
def published() -> Callable[[str], dict[str, bytes]]:
    """Return a function: name of a benchmark → small files as its addresses serve them, by name."""
    return MADE["published"]


@pytest.fixture
def card(server: Any, published: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DatasetCard]:
    """Return a function: name → its card, with its files served here and the counts of the small copy."""

    def make(name: str, **how: Any) -> DatasetCard:
        files = published(name)
        archives = tuple(Archive(file, (server.add(file, content, **how),)) for file, content in files.items())
        card = replace(CARDS[name], archives=archives, expected_counts=None, expected_total=None)
        if name == "domainnet":
            card = replace(card, classes=(card.classes or ())[:3])
        monkeypatch.setitem(CARDS._members, name, card)
        return card

    return make


@pytest.fixture
def qtdog(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qtdog", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let data sets that are known by name lie in a folder of the test."""
    monkeypatch.setenv("QTDOG_DATA", str(tmp_path / "home"))
    return tmp_path / "home"
