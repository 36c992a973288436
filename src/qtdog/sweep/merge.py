"""Merge the runs of several folders (machines) into one folder."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qtdog.core.errors import FolderInUseError, RunError
from qtdog.core.files import remove_leftovers, replacing_folder
from qtdog.runs.find import run_folders
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import read_labels, save_labels, state_folder
from qtdog.training.checkpoint import checkpoint_folders, step_of


@dataclass
class Merged:
    """The names of the merged run folders, by what was done with them.

    Attributes:
        copied: were not there, or had come less far.
        kept: were there, as far or farther.
        conflicts: are finished in both places, with different files; ours stayed.
        busy: are in use, and were left alone.
        damaged: hold a link, or something else that no run writes, and were left out.
    """

    copied: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def merge_folders(sources: Sequence[Path], out: Path) -> Merged:
    """Copy every run that is missing in `out`, or has come farther elsewhere, from the folders `sources`.

    A run is finished or not, never half: it is copied under another name and then renamed. Regular files alone are
    copied: a link in a received folder may lead to any file.

    Args:
        sources: folders of run folders; they are not changed.
        out: the folder that shall have them all.

    Raises:
        RunError: a source is no folder, or the disk is full.
    """
    found = Merged()
    remove_leftovers(out)
    for source in sources:
        if not source.is_dir():
            raise RunError(f"{source} is no folder; give the folders that hold the run folders")
        for folder in run_folders(source):
            if folder.parent != source:  # only what lies directly in it has its place by name
                continue
            getattr(found, _merge_run(folder, out / folder.name)).append(folder.name)
        for file in sorted((state_folder(source) / "studies").glob("*.json")):
            save_labels(file.stem, read_labels(file), out)
    return found


def _merge_run(theirs: Path, ours: Path) -> str:
    if not _is_plain(theirs):
        return "damaged"
    if not ours.exists():
        _copy(theirs, ours)
        return "copied"
    try:
        with RunFolder(ours).lock():
            before, after = progress_of(ours), progress_of(theirs)
            if before[0] and after[0]:
                return "kept" if _digest(ours) == _digest(theirs) else "conflicts"
            if after <= before:
                return "kept"
            _copy(theirs, ours)
            return "copied"
    except FolderInUseError:
        return "busy"


def _is_plain(folder: Path) -> bool:
    """Return whether all below a folder is folders and regular files."""
    for top, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            mode = os.lstat(os.path.join(top, name)).st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                return False
    return not folder.is_symlink()


def progress_of(path: Path) -> tuple[bool, int]:
    """Return whether a run is finished, and the step of its last checkpoint: the larger, the farther."""
    folder = RunFolder(path)
    saved = checkpoint_folders(folder.checkpoints)
    try:
        is_finished = folder.finished_result() is not None
    except RunError:  # a damaged result is none
        is_finished = False
    return is_finished, step_of(saved[-1]) if saved else 0


def _digest(path: Path) -> object:
    result = RunFolder(path).read_result()
    return None if result is None else result.get("model_sha256")


def _copy(theirs: Path, ours: Path) -> None:
    """Put a copy of `theirs` in the place of `ours`, all at once; the old copy stays if that fails."""
    with replacing_folder(ours) as new:
        _copy_tree(theirs, new)


def _copy_tree(source: Path, target: Path) -> None:
    """Copy the files below a folder; not by `shutil.copytree`, whose errors do not say that the disk is full."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy_tree(path, target / path.name)
        elif path.name != ".lock" and path.suffix != ".tmp":
            shutil.copy2(path, target / path.name, follow_symlinks=False)
