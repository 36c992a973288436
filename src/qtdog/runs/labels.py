"""Names for runs: those that a study gives, which runs share a row of a table, and what tells two rows apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtdog.core.errors import RunError
from qtdog.core.safe_text import read_json
from qtdog.runs.finished import FinishedRun

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


Settings = Mapping[str, Any]


def label_rows(runs: Sequence[FinishedRun], *, pooled: bool = False) -> dict[str, list[FinishedRun]]:
    """Return runs by row: methods in the order of their first appearance, settings of one by name.

    A run that a study names stands under each of its names.

    Args:
        runs: of one data set.
        pooled: make one row of all settings of a method.
    """
    methods: dict[str, list[FinishedRun]] = {}
    for run in runs:
        for name in run.names or (run.method,):
            methods.setdefault(name, []).append(run)
    if pooled:
        return methods
    rows: dict[str, list[FinishedRun]] = {}
    for method, group in methods.items():
        labels = setting_labels([method] * len(group), [run.settings for run in group])
        for label in sorted(set(labels)):
            rows[label] = [run for run, its in zip(group, labels, strict=True) if its == label]
    return rows


def setting_labels(methods: Sequence[str], settings: Sequence[Settings]) -> list[str]:
    """Return a label for each of several runs: its method, and what its settings differ in.

    Where a method appears with several settings, its labels say in which values they are not the most common one:
    "erm + lsq 7 bit (step_mode=raw)".

    Args:
        methods: name of the method of each.
        settings: of each, by `section.key`.

    Example:
        >>> setting_labels(["lsq", "lsq", "lsq"], [{"q.bits": 7}, {"q.bits": 7}, {"q.bits": 4}])
        ['lsq', 'lsq', 'lsq (bits=4)']
    """
    labels = list(methods)
    for method in dict.fromkeys(methods):
        indices = [index for index, name in enumerate(methods) if name == method]
        for index, text in zip(indices, _differences([settings[index] for index in indices]), strict=True):
            labels[index] = f"{method} ({text})" if text else method
    return labels


def _differences(settings: Sequence[Settings]) -> list[str]:
    keys = differing(settings)
    common = {key: Counter(value_text(one.get(key)) for one in settings).most_common(1)[0][0] for key in keys}
    texts = [{key: value_text(one.get(key)) for key in keys} for one in settings]
    return [", ".join(f"{_short(key, keys)}={text[key]}" for key in keys if text[key] != common[key]) for text in texts]


def differing(settings: Sequence[Settings]) -> list[str]:
    """Return the keys whose values are not all alike, among those that have the key.

    Example:
        >>> differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}])
        ['b']
    """
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({value_text(one[key]) for one in settings if key in one}) > 1]


def _short(key: str, keys: Sequence[str]) -> str:
    """Return a key without its section, if no other key would read the same and the name says enough."""
    last = key.rpartition(".")[2]
    alone = [other.rpartition(".")[2] for other in keys].count(last) == 1
    return last if alone and last not in ("name", "params") else key


def value_text(value: Any) -> str:
    """Return a value for people.

    Example:
        >>> value_text(5e-05), value_text([0.5, 1.0]), value_text(None), value_text({"p": 0.5})
        ('5e-05', '[0.5, 1]', 'default', '{p: 0.5}')
    """
    if value is None:
        return "default"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(value_text(one) for one in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_text(one)}" for key, one in value.items()) + "}"
    return str(value)
