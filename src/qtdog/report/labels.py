"""Names of rows: the method, and what its settings differ in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qtdog.report.entry import Entry

Settings = Mapping[str, Any]


def label_rows(entries: Sequence[Entry], *, pooled: bool = False) -> dict[str, list[Entry]]:
    """Return the entries by row: methods in the order of their first appearance, settings of one by name.

    A row is a method with its settings. Where a method appears with several settings, its rows say in which values
    they are not the most common one: "erm + lsq 7 bit (step_mode=raw)".

    Args:
        entries: of one data set.
        pooled: make one row of all settings of a method.
    """
    methods: dict[str, list[Entry]] = {}
    for entry in entries:
        methods.setdefault(entry.method, []).append(entry)
    if pooled:
        return methods
    return {label: row for method, group in methods.items() for label, row in _split(method, group).items()}


def _split(method: str, group: Sequence[Entry]) -> dict[str, list[Entry]]:
    keys = differing([entry.settings for entry in group])
    common = {key: Counter(value_text(entry.settings.get(key)) for entry in group).most_common(1)[0][0] for key in keys}
    rows: dict[str, list[Entry]] = {}
    for entry in group:
        values = {key: value_text(entry.settings.get(key)) for key in keys}
        said = [f"{_short(key, keys)}={value}" for key, value in values.items() if value != common[key]]
        rows.setdefault(f"{method} ({', '.join(said)})" if said else method, []).append(entry)
    return dict(sorted(rows.items()))


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
