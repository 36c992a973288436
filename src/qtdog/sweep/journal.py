"""The journal of a sweep, in `.sweep` beside the runs: failures, times, and the names that studies give to runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qtdog.core.errors import RunError
from qtdog.core.files import clear_disk_errors, write_atomic
from qtdog.core.safe_text import parse_json, read_json, read_text
from qtdog.runs.finished import Labels, read_labels, state_folder

MAX_FAILURE_BYTES = 2**20
MAX_JOURNAL_BYTES = 64 * 2**20
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
    """

    name: str
    status: Status
    reason: str = ""
    error: str = ""
    seconds: float = 0.0
    trained_s: float = 0.0


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
    """Add one line with the time that a finished task took."""
    file = state_folder(out) / "journal.jsonl"
    line = {"name": outcome.name, "seconds": outcome.seconds, "trained_s": outcome.trained_s, "steps": steps}
    with clear_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def read_journal(out: Path) -> dict[str, dict[str, Any]]:
    """Return the times of the finished tasks by name; a damaged line is left out.

    So is the line of a task whose training was resumed or shared: its time is that of the last start only.
    """
    file, found = state_folder(out) / "journal.jsonl", {}
    for text in read_text(file, MAX_JOURNAL_BYTES).splitlines() if file.is_file() else ():
        try:
            line = parse_json(text)
            if line["seconds"] >= line["trained_s"]:
                found[line["name"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found


def save_labels(name: str, labels: Mapping[str, Sequence[Labels]], out: Path) -> None:
    """Save what a study calls its runs, for the index: folder → labels.

    What an earlier version of the study called runs that it no longer has is kept.
    """
    file = state_folder(out) / "studies" / f"{name}.json"
    known = read_labels(file) | {folder: list(several) for folder, several in labels.items() if several}
    text = json.dumps(known, indent=0)
    if not file.is_file() or file.read_text() != text:
        write_atomic(file, text)
