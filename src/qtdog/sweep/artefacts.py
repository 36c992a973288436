"""Run folders on the way between machines that share no disk."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qtdog.core.files import clear_disk_errors
from qtdog.sweep.task import Task

Parcels = Mapping[str, bytes]  # folder name → its content


def pack(folder: Path, only: Sequence[str] = ()) -> bytes:
    """Return the content of a run folder as an uncompressed tar archive, without locks and temporary files.

    Args:
        folder: of the run.
        only: names in it, like "checkpoint/step-00000010"; all if empty.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in only or sorted(path.name for path in folder.iterdir()):
            archive.add(folder / name, arcname=name, filter=_wanted)
    return stream.getvalue()


def _wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(info.name).name
    return None if name == ".lock" or name.endswith(".tmp") else info


def unpack(content: bytes, folder: Path) -> None:
    """Make `folder` hold what `pack` packed, all at once; what it held before is replaced.

    Raises:
        tarfile.TarError: the archive is damaged, or would write outside of the folder.
        RunError: the disk is full.
    """
    with clear_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            new = temporary / "new"
            with tarfile.open(fileobj=io.BytesIO(content), mode="r") as archive:
                archive.extractall(new, filter="data")
            if folder.exists():
                folder.rename(temporary / "old")
            new.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def inputs(task: Task, out: Path) -> dict[str, bytes]:
    """Return what another machine needs to do a task: what it came to so far, its beginning, its members."""
    parcels = {}
    if task.folder(out).is_dir():
        parcels[task.name] = pack(task.folder(out))
    if task.begin:
        checkpoint = f"checkpoint/step-{task.step:08d}"
        if (out / task.begin / checkpoint).is_dir():
            parcels[task.begin] = pack(out / task.begin, [checkpoint])
    for name in task.join.members if task.join else ():
        parcels[name] = pack(out / name)
    return parcels
