"""An audit hook that notes what no input and no disturbance may bring about."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "webbrowser.open")
CONNECTS = ("socket.connect",)
# event → where in its arguments the changed path is, and the handle of the folder that it is relative to
CHANGES = {
    "os.mkdir": (0, 2),
    "os.rmdir": (0, 1),
    "os.remove": (0, 1),
    "os.chmod": (0, 2),
    "os.rename": (1, 3),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
    "os.truncate": (0, 9),
}


def changed_path(event: str, arguments: Sequence[Any]) -> str:
    """Return the whole path of what an audit event changes, links of its folders resolved; "" for none."""
    folder = -1
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return ""
    elif event in CHANGES:
        place, handle = CHANGES[event]
        path = arguments[place]
        folder = arguments[handle] if handle < len(arguments) else -1
    else:
        return ""
    if not isinstance(path, str | bytes | os.PathLike):
        return ""  # a handle: its opening was seen
    name = os.fsdecode(path)
    if folder != -1:
        name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    if event == "open":
        return os.path.realpath(name)
    above, last = os.path.split(os.path.abspath(name))
    return os.path.join(os.path.realpath(above), last)


def is_device(path: str) -> bool:
    """Return whether a path is of a device or process; a folder in memory is none, the memory that processes share is.

    Example:
        >>> [is_device(path) for path in ("/dev/null", "/proc/self/fd/1", "/dev/shm/torch_1", "/dev/shm/a/b", "/tmp/a")]
        [True, True, True, False, False]
    """
    shared = path.removeprefix("/dev/shm/")
    return "/" not in shared if shared != path else path.startswith(("/dev/", "/proc/"))


class _Watch:
    """The hook of this process; one cannot be removed."""

    def __init__(self) -> None:
        self.places: tuple[str, ...] = ()
        self.forbidden: tuple[str, ...] = ()
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.places:
            return
        if event in self.forbidden:
            self.seen.append(f"{event} {arguments}")
        elif (path := changed_path(event, arguments)) and not (path.startswith(self.places) or is_device(path)):
            self.seen.append(f"{path} is changed")


_ONLY: list[_Watch] = []


@contextlib.contextmanager
def watched(*places: str | os.PathLike[str], forbidden: Sequence[str] = (*STARTS, *CONNECTS)) -> Iterator[list[str]]:
    """Yield the list of started programs, connections, and changes of files outside of some folders in this block.

    Args:
        places: where files may be changed.
        forbidden: events that must not happen.
    """
    if not _ONLY:
        _ONLY.append(_Watch())
    watch = _ONLY[0]
    watch.seen, watch.forbidden = [], tuple(forbidden)
    watch.places = tuple(os.path.realpath(place) for place in places)
    try:
        yield watch.seen
    finally:
        watch.places = ()
