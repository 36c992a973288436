"""Names for runs: which of them share a row of a table, and what tells two rows of one method apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qtdog.runs.finished import FinishedRun

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
