"""Download one file from servers that break off, lie, stall, and send what nobody asked for.

    python tests/stress/hostile_servers.py [--count 200]

Each behavior is a function that answers one connection. What comes out must be the whole file or a DataError that says
why, within five seconds; a file of another content must never get its name, memory stays within 100 MiB, no file is
changed elsewhere and no program is started. The first pass is over every behavior; a larger count mixes them at
random, one for each reconnection.
"""

from __future__ import annotations

import argparse
import random
import resource
import runpy
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qtdog.core.errors import DataError
from qtdog.data.cards import Archive
from qtdog.data.download import Limits, download

CONTENT = bytes(range(256)) * 80
N = len(CONTENT)
LIMITS = Limits(timeout_s=0.4, attempts=3, reconnects=30, pause_s=0.0, slow_bytes_per_s=5000, slow_s=0.3)
MAX_SECONDS = 5.0
MAX_GROWTH_KIB = 100 * 1024
WATCH = runpy.run_path(str(Path(__file__).with_name("watch.py")))
Answer = Callable[["Connection"], None]


class Connection:
    """One request: where it wants to go on, and how to answer."""

    def __init__(self, sock: socket.socket, port: int) -> None:
        self.sock, self.port = sock, port
        request = b""
        while b"\r\n\r\n" not in request and len(request) < 10_000:
            part = sock.recv(4096)
            if not part:
                break
            request += part
        lines = request.decode("latin-1").lower().splitlines()
        ranges = [line for line in lines if line.startswith("range:")]
        self.start = int(ranges[0].partition("bytes=")[2].rstrip("-")) if ranges else 0
        self.path = request.split(b" ")[1].decode("latin-1") if request.count(b" ") > 1 else "/"

    def send(self, *lines: str, body: bytes = b"") -> None:
        self.sock.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body)

    def whole(self, *more: str, status: str = "200 OK", body: bytes = CONTENT, length: object = N) -> None:
        size = [] if length is None else [f"Content-Length: {length}"]
        self.send(f"HTTP/1.1 {status}", 'ETag: "1"', *size, *more, body=body)

    def part(self, content_range: str, body: bytes, *more: str, length: object = None) -> None:
        size = len(body) if length is None else length
        self.send(
            "HTTP/1.1 206 Partial", f"Content-Range: {content_range}", f"Content-Length: {size}", *more, body=body
        )


def first_half_then(rest: Answer) -> Answer:
    """Return what sends half of the file to a first request, and answers one that goes on as `rest` does."""

    def answer(one: Connection) -> None:
        rest(one) if one.start else one.whole(body=CONTENT[: N // 2])

    return answer


def proper(one: Connection) -> None:
    if one.start:
        one.part(f"bytes {one.start}-{N - 1}/{N}", CONTENT[one.start :], 'ETag: "1"')
    else:
        one.whole()


def dripping_headers(one: Connection) -> None:
    for letter in "HTTP/1.1 200 OK\r\nX: " + "a" * 2000:
        one.sock.sendall(letter.encode())
        time.sleep(0.05)


def dripping_body(one: Connection) -> None:
    one.whole(body=b"")
    for byte in CONTENT:
        one.sock.sendall(bytes([byte]))
        time.sleep(0.01)


def a_byte_each(one: Connection) -> None:
    body = CONTENT[one.start : one.start + 1]
    one.part(f"bytes {one.start}-{N - 1}/{N}", body, 'ETag: "1"', length=N - one.start) if one.start else one.whole(
        body=body
    )


def endless(one: Connection) -> None:
    one.send("HTTP/1.1 200 OK", 'ETag: "1"')
    while True:
        one.sock.sendall(b"x" * 65536)


def circle(one: Connection) -> None:
    one.send("HTTP/1.1 302 Found", f"Location: http://127.0.0.1:{one.port}{one.path}x", "Content-Length: 0")


def moved(place: str) -> Answer:
    return lambda one: one.send("HTTP/1.1 302 Found", f"Location: {place}", "Content-Length: 0")


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> Answer:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end
    return lambda one: one.send("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", body=body)


def going_on(content_range: str, *more: str, body: bytes = CONTENT[N // 2 :], length: object = None) -> Answer:
    return first_half_then(lambda one: one.part(content_range, body, *(more or ('ETag: "1"',)), length=length))


HALF = N // 2
WHOLE, REFUSED, EITHER = "whole", "refused", "either"
BEHAVIORS: dict[str, tuple[str, Answer]] = {
    "proper": (WHOLE, proper),
    "half, then proper": (WHOLE, first_half_then(proper)),
    "half, then the whole": (WHOLE, first_half_then(lambda one: one.whole())),
    "no length, whole": (WHOLE, lambda one: one.whole(length=None)),
    "chunked": (WHOLE, chunked(CONTENT[:100], CONTENT[100:])),
    "chunked, cut": (REFUSED, chunked(CONTENT[:100], end=b"")),
    "chunked, no number": (REFUSED, chunked(end=b"zz\r\n")),
    "nothing": (REFUSED, lambda one: None),
    "silence": (REFUSED, lambda one: time.sleep(2)),
    "half for ever": (REFUSED, lambda one: one.whole(body=CONTENT[:HALF])),
    "headers drip": (REFUSED, dripping_headers),
    "body drips": (REFUSED, dripping_body),
    "a byte for each request": (REFUSED, a_byte_each),
    "endless": (REFUSED, endless),
    "endless headers": (REFUSED, lambda one: one.send("HTTP/1.1 200 OK", *["X: " + "a" * 1000] * 300)),
    "headers cut off": (REFUSED, lambda one: one.sock.sendall(b"HTTP/1.1 200 OK\r\nX: a")),
    "a header of a megabyte": (REFUSED, lambda one: one.send("HTTP/1.1 200 OK", "X: " + "a" * 2**20)),
    "no protocol": (REFUSED, lambda one: one.sock.sendall(b"hello\r\n\r\n")),
    "binary": (REFUSED, lambda one: one.sock.sendall(b"\x00\xff" * 500)),
    "status 000": (REFUSED, lambda one: one.whole(status="000 X")),
    "status 99999": (REFUSED, lambda one: one.whole(status="99999 X")),
    "no content": (REFUSED, lambda one: one.send("HTTP/1.1 204 None")),
    "accepted": (REFUSED, lambda one: one.whole(status="202 Accepted")),
    "continue for ever": (REFUSED, lambda one: one.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 5000)),
    "not modified": (REFUSED, lambda one: one.send("HTTP/1.1 304 Same")),
    "gone": (REFUSED, lambda one: one.send("HTTP/1.1 410 Gone", "Content-Length: 0")),
    "busy": (REFUSED, lambda one: one.send("HTTP/1.1 503 Busy", "Content-Length: 0")),
    "a page": (REFUSED, lambda one: one.whole("Content-Type: text/html")),
    "compressed": (REFUSED, lambda one: one.whole("Content-Encoding: gzip")),
    "length is no number": (REFUSED, lambda one: one.whole(length="many")),
    "length is negative": (REFUSED, lambda one: one.whole(length=-1)),
    "length has a sign": (REFUSED, lambda one: one.whole(length=f"+{N}")),
    "length has other digits": (REFUSED, lambda one: one.whole(length="\xb2\xb3")),
    "two lengths": (REFUSED, lambda one: one.whole("Content-Length: 5")),
    "length beyond the card": (REFUSED, lambda one: one.whole(length=10**12)),
    "length of 30 digits": (REFUSED, lambda one: one.whole(length="9" * 30)),
    "length too short": (EITHER, lambda one: one.whole(length=HALF)),
    "206 unasked": (REFUSED, lambda one: one.part(f"bytes 0-{N - 1}/{N}", CONTENT)),
    "a shorter 206": (REFUSED, going_on(f"bytes {HALF}-{HALF + 99}/{HALF + 100}", body=CONTENT[HALF : HALF + 100])),
    "206 of a longer file": (REFUSED, going_on(f"bytes {HALF}-{N}/{N + 1}", body=CONTENT[HALF:] + b"x")),
    "206 of the start": (REFUSED, going_on(f"bytes 0-{HALF - 1}/{N}", body=CONTENT[:HALF])),
    "206 from elsewhere": (REFUSED, going_on(f"bytes {HALF + 1}-{N - 1}/{N}", body=CONTENT[HALF + 1 :])),
    "206 with another length": (REFUSED, going_on(f"bytes {HALF}-{N - 1}/{N}", length=7)),
    "206 with another etag": (REFUSED, going_on(f"bytes {HALF}-{N - 1}/{N}", 'ETag: "2"')),
    "206 without etag": (WHOLE, going_on(f"bytes {HALF}-{N - 1}/{N}", "X: y")),
    "206 of unknown length": (WHOLE, going_on(f"bytes {HALF}-{N - 1}/*")),
    "206 without a range": (REFUSED, going_on("")),
    "206 in other units": (REFUSED, going_on(f"lines {HALF}-{N - 1}/{N}")),
    "206 backwards": (REFUSED, going_on(f"bytes {HALF}-3/{N}")),
    "206 of huge numbers": (REFUSED, going_on(f"bytes {'9' * 40}-{'9' * 41}/{'9' * 42}")),
    "416 for ever": (REFUSED, first_half_then(lambda one: one.send("HTTP/1.1 416 No", "Content-Length: 0"))),
    "a circle": (REFUSED, circle),
    "moved to a file": (REFUSED, moved("file:///etc/passwd")),
    "moved to ftp": (REFUSED, moved("ftp://127.0.0.1/x")),
    "moved to data": (REFUSED, moved("data:text/plain,x")),
    "moved nowhere": (REFUSED, lambda one: one.send("HTTP/1.1 302 Found", "Content-Length: 0")),
    "moved to no address": (REFUSED, moved("http://[::1")),
    "moved with a line break": (REFUSED, moved("http://127.0.0.1:1/\x0bx y")),
    "moved to a closed port": (REFUSED, moved("http://127.0.0.1:1/")),
}  # fmt: skip


def serve(answers: Sequence[Answer]) -> tuple[int, Callable[[], None]]:
    """Answer connections on a port, the last answer again and again; return the port and what ends it."""
    listener = socket.create_server(("127.0.0.1", 0))
    port, left = listener.getsockname()[1], list(answers)

    def one(sock: socket.socket, answer: Answer) -> None:
        with sock:
            sock.settimeout(10)
            try:
                answer(Connection(sock, port))
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the other side went away

    def loop() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            answer = left.pop(0) if len(left) > 1 else left[0]
            threading.Thread(target=one, args=(sock, answer), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()

    def end() -> None:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()

    return port, end


def problem(answers: Sequence[Answer], expected: str = EITHER) -> str:
    """Download from a server of such answers; return what is wrong with what came of it, "" for nothing."""
    port, end = serve(answers)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = Archive("a.bin", (f"http://127.0.0.1:{port}/a",), max_bytes=N * 4)
        try:
            found = download(archive, folder, limits=LIMITS).path.read_bytes()
            came = WHOLE if found == CONTENT else "another content"
        except DataError:
            came = REFUSED
        except Exception as error:
            came = f"{type(error).__name__}: {error}"
        finally:
            end()
        if came == REFUSED and (folder / "a.bin").exists():
            came = "refused, and the file has its name"
    if time.monotonic() - started > MAX_SECONDS:
        return f"{came} after {time.monotonic() - started:.1f} s"
    return "" if came in ({WHOLE, REFUSED} if expected == EITHER else {expected}) else came


def length_may_be_short(names: Sequence[str]) -> bool:
    """Return whether a server claims a shorter file: nobody can know better without a hash."""
    return any(name in ("length too short", "chunked, cut", "no length, whole") for name in names)


def main() -> None:
    """Try every behavior, then random mixtures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="behaviors and mixtures of them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with WATCH["watched"](tempfile.gettempdir(), forbidden=WATCH["STARTS"]) as seen:
        faults = run(options.count, options.seed)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    faults += [*seen, *([f"memory grew by {growth >> 10} MiB"] if growth > MAX_GROWTH_KIB else [])]
    print(f"{len(BEHAVIORS)} behaviors, {max(options.count, len(BEHAVIORS))} downloads, {len(faults)} faults")
    print("\n".join(faults))
    sys.exit(1 if faults else 0)


def run(count: int, seed: int) -> list[str]:
    """Try every behavior, then random mixtures up to a count, and return the faults."""
    rng, faults = random.Random(seed), list[str]()
    for name, (expected, answer) in BEHAVIORS.items():
        if name != "length too short" and (found := problem([answer], expected)):
            faults.append(f"{name}: {found}")
    mixable = [name for name in BEHAVIORS if not length_may_be_short([name])]
    for number in range(max(0, count - len(BEHAVIORS))):
        names = rng.choices(mixable, k=rng.randint(2, 5))
        if found := problem([BEHAVIORS[name][1] for name in names]):
            faults.append(f"mixture {number} {names}: {found}")
    return faults


if __name__ == "__main__":
    main()
