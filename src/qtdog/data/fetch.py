"""From the name of a benchmark to a usable folder: download, unpack, lay out, list and remember hashes.

Everything happens in a hidden folder beside the target, `.NAME.fetch`; the target appears when it is whole. What was
downloaded stays there if something breaks off, and the next attempt goes on from it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import DataError, RunError
from qtdog.core.files import clear_disk_errors, lock_file, write_atomic
from qtdog.core.progress import Progress
from qtdog.core.safe_text import read_json
from qtdog.data.archive import is_archive, unpack
from qtdog.data.cards import DatasetCard, data_root
from qtdog.data.download import Bytes, Downloaded, Limits, download, download_record
from qtdog.data.file_index import NOTES
from qtdog.data.import_layouts import adopt, require_new

KNOWN = "fetched.json"


@dataclass(frozen=True)
class Steps:
    """How a fetch tells what it is doing.

    Attributes:
        download: of the bytes of a file.
        unpack: of the files of an archive.
        place: of laying out and hashing the files.
    """

    download: Bytes | None = None
    unpack: Progress = None
    place: Progress = None


@dataclass(frozen=True)
class Fetched:
    """What came of a fetch.

    Attributes:
        folder: the data set.
        files: what was downloaded.
        first_time: the files whose hash nobody had published or remembered: it is trusted, and remembered from now on.
        layout: how it was laid out before.
    """

    folder: Path
    files: list[Downloaded]
    first_time: list[str]
    layout: str

    @property
    def n_saved(self) -> int:
        """Bytes that were there from a former attempt."""
        return sum(file.n_saved for file in self.files)


def work_folder(target: Path) -> Path:
    """Return where a fetch into `target` keeps what it downloads."""
    return target.parent / f".{target.name}.fetch"


def fetch(
    card: DatasetCard,
    target: Path,
    *,
    steps: Steps | None = None,
    limits: Limits | None = None,
    settle: Callable[[Fetched], None] | None = None,
) -> Fetched:
    """Download the data set into the new folder `target`.

    A hash that the card gives must be met. Where nobody published one, that of the first complete fetch is remembered
    in the data home and must be met from then on: trust on first use.

    Args:
        card: of the data set.
        target: its folder to be; it must be new, but after a fetch that was stopped.
        steps: progress.
        limits: of the downloads.
        settle: checks what came, and remembers it, while the working folder is still there: if the process is killed
            meanwhile, the next call does it again.

    Raises:
        DataError: it has no address, a download failed, the content is another one, or an archive is refused.
        RunError: the disk is full, or another process fetches into the same folder.
    """
    steps = steps or Steps()
    if not card.archives:
        hint = f"qtdog data import FOLDER --as {card.name}"
        raise DataError(f"{card.name} cannot be downloaded. {card.note} {hint}".replace("  ", " "))
    work = work_folder(target)
    begun = work.is_dir()
    if not begun:
        require_new(target)
    with _alone(work):
        known = remembered(card.name)
        if begun and (placed := _placed(card, target, known)) is not None:
            _settle(placed, settle, work)
            return placed
        require_new(target)
        files = [
            download(
                archive,
                work,
                sha256=archive.sha256 or known.get(archive.file, ""),
                progress=steps.download,
                limits=limits,
            )
            for archive in card.archives
        ]
        layout = _unpack_and_place(work, files, card, target, steps)
        expected = {archive.file: archive.sha256 or known.get(archive.file, "") for archive in card.archives}
        first_time = [file.path.name for file in files if not expected[file.path.name]]
        fetched = Fetched(target, files, first_time, layout)
        _settle(fetched, settle, work)
    return fetched


def _settle(fetched: Fetched, settle: Callable[[Fetched], None] | None, work: Path) -> None:
    if settle is not None:
        settle(fetched)
    with clear_disk_errors(work):
        shutil.rmtree(work)


def _placed(card: DatasetCard, target: Path, known: Mapping[str, str]) -> Fetched | None:
    """Return what a fetch came to that was killed when its folder had its name already; None if it had not."""
    file = target / NOTES / "origin.json"
    if not file.is_file():
        return None
    origin = read_json(file, kind=DataError)
    try:
        if origin["dataset"] != card.name:
            return None
        files = [
            Downloaded(target / one["file"], one["url"], one["sha256"], one["n_bytes"], one["n_saved"])
            for one in origin["files"]
        ]
        expected = {archive.file: archive.sha256 or known.get(archive.file, "") for archive in card.archives}
        return Fetched(target, files, [one.path.name for one in files if not expected[one.path.name]], origin["layout"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error!r}); remove {target} and fetch it anew") from error


def _unpack_and_place(work: Path, files: list[Downloaded], card: DatasetCard, target: Path, steps: Steps) -> str:
    loose = work / "unpacked"
    shutil.rmtree(loose, ignore_errors=True)
    try:
        loose.mkdir()
        for file in files:
            _unpack_one(file.path, loose, steps.unpack)
        now = datetime.datetime.now(datetime.UTC).date().isoformat()
        origin: dict[str, Any] = {"dataset": card.name, "date": now, "files": [download_record(file) for file in files]}
        return adopt(loose, target, card, "move", origin, progress=steps.place)
    except DataError as error:
        raise DataError(f"{error} What was downloaded is in {work}; remove it to download it anew.") from error
    finally:
        shutil.rmtree(loose, ignore_errors=True)


def _unpack_one(path: Path, loose: Path, progress: Progress) -> None:
    if not is_archive(path.name):
        os.link(path, loose / path.name)
        return
    try:
        unpack(path, loose, progress)
    except DataError:
        path.unlink()  # it would be refused again: the next attempt must download it anew
        raise


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Hold the working folder for this process; an empty one is removed afterwards."""
    with clear_disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock_file(handle)
    except BlockingIOError as error:
        os.close(handle)
        raise RunError(f"another process is fetching into {work}; wait for it") from error
    try:
        yield
    finally:
        os.close(handle)
        if work.is_dir() and [path.name for path in work.iterdir()] == [".lock"]:
            shutil.rmtree(work)


def remembered(name: str) -> dict[str, str]:
    """Return file → sha256 of what was fetched before of a data set (DataError if the note is damaged)."""
    path = data_root() / KNOWN
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path, kind=DataError).get(name, {}))
    except (DataError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it to trust the next download anew") from error


def remember(name: str, fetched: Fetched) -> Path:
    """Remember the hashes of a fetch; return where (DataError if the note is damaged, RunError if the disk is full)."""
    path = data_root() / KNOWN
    remembered(name)
    tree = read_json(path, kind=DataError) if path.is_file() else {}
    tree.setdefault(name, {}).update({file.path.name: file.sha256 for file in fetched.files})
    write_atomic(path, json.dumps(tree, indent=1, sort_keys=True) + "\n")
    return path
