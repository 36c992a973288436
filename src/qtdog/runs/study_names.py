"""What a sweep writes beside its runs for those who read them: the names that its study has for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qtdog.core.errors import RunError
from qtdog.core.safe_text import read_json

Scalar = bool | int | float | str
Labels = dict[str, Scalar]  # what a study calls one of its runs: method, target, seed and its other axes
MAX_LABELS_BYTES = 64 * 2**20
REPLICATES = ("seed", "trial", "draw")


def state_folder(out: Path) -> Path:
    """Return where a sweep in the folder `out` keeps what is no run: failures, logs, plans, the index."""
    return out / ".sweep"


def study_files(out: Path) -> list[Path]:
    """Return the files with the names that studies have for the runs in a folder, sorted."""
    return sorted((state_folder(out) / "studies").glob("*.json"))


def read_labels(file: Path) -> dict[str, list[Labels]]:
    """Return by name of a run's folder its labels: method, target, seed and the other axes, for each of its names.

    Nothing if the file is not there or damaged.
    """
    try:
        content = read_json(file, max_bytes=MAX_LABELS_BYTES)
    except RunError:
        return {}
    return content if isinstance(content, dict) and all(map(_are_labels, content.values())) else {}


def _are_labels(several: object) -> bool:
    return isinstance(several, list) and all(
        isinstance(one, dict) and all(isinstance(value, bool | int | float | str) for value in one.values())
        for one in several
    )


def read_failure_reasons(out: Path) -> dict[str, str]:
    """Return why tasks of a sweep failed, by name of the task; a damaged file counts as none."""
    reasons = {}
    for file in sorted((state_folder(out) / "failed").glob("*.json")):
        try:
            reasons[file.stem] = str(read_json(file, max_bytes=MAX_LABELS_BYTES)["reason"])
        except (RunError, KeyError, TypeError, IndexError):
            continue
    return reasons


def axis_names(axis: str) -> list[str]:
    """Return the names of an axis, which may be of several keys at once."""
    return [name.strip() for name in axis.split(",")]


def study_method(labels: Mapping[str, object]) -> str:
    """Return a study's name for a method, with the values of axes that are neither target nor repetition.

    Example:
        >>> study_method({"method": "lsq", "target": "75", "seed": 1, "quantizer.bits": 4})
        'lsq bits=4'
    """
    common = {"target", *REPLICATES}
    own = [
        f"{name.rpartition('.')[2]}={value}"
        for name, value in labels.items()
        if name != "method" and not set(axis_names(name)) & common
    ]
    return " ".join([str(labels.get("method")), *own])
