"""The journal of a sweep, in `.sweep` beside the runs: failures, times, names; and merging several folders of runs."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qtdog.core.errors import FolderInUseError, RunError
from qtdog.core.files import clear_disk_errors, remove_leftovers, replacing_folder, write_atomic
from qtdog.core.safe_text import parse_json, read_json, read_text
from qtdog.runs.find import run_folders
from qtdog.runs.finished import Labels, read_labels, state_folder
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import checkpoint_folders, step_of

MAX_FAILURE_BYTES = 2**20
MAX_JOURNAL_BYTES = 64 * 2**20
MAX_WARNINGS, MAX_WARNING_CHARS = 10, 500  # of one task
Status = Literal["done", "failed", "busy", "stopped", "disk", "lost"]


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        name: of the task.
        status: done; failed for a reason of its own; busy (another process is at it); stopped on request, its state
            saved; disk (full or not writable); lost (its process died).
        reason: why not, for people.
        error: class of the error, "" if there was none.
        seconds: wall-clock time that it took.
        trained_s: of them, in training steps.
        warnings: what the task said without ending for it, at most `MAX_WARNINGS`.
    """

    name: str
    status: Status
    reason: str = ""
    error: str = ""
    seconds: float = 0.0
    trained_s: float = 0.0
    warnings: Sequence[str] = ()


def save_failure(outcome: Outcome, out: Path) -> None:
    """Save why a task failed, until it is done."""
    write_atomic(state_folder(out) / "failed" / f"{outcome.name}.json", json.dumps(asdict(outcome), indent=1))


def remove_failure(name: str, out: Path) -> None:
    """Remove what was saved of an earlier failure."""
    (state_folder(out) / "failed" / f"{name}.json").unlink(missing_ok=True)


def read_failures(out: Path) -> dict[str, Outcome]:
    """Return the saved failures by task; a damaged file is left out."""
    found = {}
    for file in sorted((state_folder(out) / "failed").glob("*.json")):
        try:
            found[file.stem] = Outcome(**read_json(file, max_bytes=MAX_FAILURE_BYTES))
        except (RunError, TypeError):
            continue
    return found


def append_journal(outcome: Outcome, steps: int, out: Path) -> None:
    """Add one line with the time that a finished task took, and what it warned of."""
    file = state_folder(out) / "journal.jsonl"
    line = {"name": outcome.name, "seconds": outcome.seconds, "trained_s": outcome.trained_s, "steps": steps}
    if outcome.warnings:
        line["warnings"] = list(outcome.warnings)
    with clear_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def read_journal(out: Path) -> dict[str, dict[str, Any]]:
    """Return the times of the finished tasks by name; a damaged line is left out.

    So is the line of a task whose training was resumed or shared: its time is that of the last start only.
    """
    return {line["name"]: line for line in _journal_lines(out) if line["seconds"] >= line["trained_s"]}


def read_warnings(out: Path) -> dict[str, list[str]]:
    """Return what finished tasks warned of, by name; those that warned of nothing are left out."""
    found = {line["name"]: [str(one) for one in line.get("warnings", ())] for line in _journal_lines(out)}
    return {name: warnings for name, warnings in found.items() if warnings}


def _journal_lines(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the journal in their order, without damaged ones."""
    file = state_folder(out) / "journal.jsonl"
    for text in read_text(file, MAX_JOURNAL_BYTES).splitlines() if file.is_file() else ():
        try:
            line = parse_json(text)
            has_times = all(
                isinstance(line[time], (int, float)) and line[time] >= 0 for time in ("seconds", "trained_s")
            )
            is_whole = has_times and isinstance(line["name"], str) and isinstance(line.get("warnings", []), list)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if is_whole:
            yield line


def save_labels(name: str, labels: Mapping[str, Sequence[Labels]], out: Path) -> None:
    """Save what a study calls its runs, for the index: folder → labels.

    What an earlier version of the study called runs that it no longer has is kept.
    """
    file = state_folder(out) / "studies" / f"{name}.json"
    known = read_labels(file) | {folder: list(several) for folder, several in labels.items() if several}
    text = json.dumps(known, indent=0)
    if not file.is_file() or file.read_text() != text:
        write_atomic(file, text)


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
