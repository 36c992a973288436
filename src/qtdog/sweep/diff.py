"""What two sets of runs do not have in common, and by which values they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtdog.core.config import Config
from qtdog.core.config_io import differences
from qtdog.core.errors import QtdogError
from qtdog.runs.folder import RunFolder
from qtdog.sweep.index import run_folders
from qtdog.sweep.plan import Plan

Configs = Mapping[str, Config]


@dataclass(frozen=True)
class Difference:
    """What differs between two sets of runs, A and B.

    Attributes:
        common: number of runs that both have.
        changed: lines `section.key: A → B` of pairs of runs that are nearest to each other → how many pairs.
        only_first: folders of A's runs without a counterpart.
        only_second: of B's.
    """

    common: int
    changed: Mapping[tuple[str, ...], int]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def of_plan(plan: Plan) -> dict[str, Config]:
    """Return the configurations of a study's runs by folder name."""
    return {task.name: task.config for task in plan.tasks if task.kind == "run" and task.config is not None}


def of_folder(out: Path) -> dict[str, Config]:
    """Return the configurations of the runs in a folder by their folder's name; what cannot be read is left out."""
    found = {}
    for folder in run_folders(out):
        if folder.name.startswith("prefix-"):
            continue
        try:
            config = RunFolder(folder).read_config()
        except QtdogError:
            continue
        if config is not None:
            found[folder.name] = config
    return found


def diff(first: Configs, second: Configs) -> Difference:
    """Return what differs between two sets of runs; those in one only are paired with the nearest of the other.

    Example:
        >>> from qtdog.core.config_io import build_config
        >>> seven, four = (build_config([{"quantizer": {"bits": bits}}]) for bits in (7, 4))
        >>> diff({"a": seven}, {"b": four}).changed
        {('quantizer.bits: 7 → 4',): 1}
    """
    only_first = {name: config for name, config in first.items() if name not in second}
    only_second = {name: config for name, config in second.items() if name not in first}
    pairs = sorted(
        ((tuple(_lines(one, other)), a, b) for a, one in only_first.items() for b, other in only_second.items()),
        key=lambda pair: len(pair[0]),
    )
    left, right = set(only_first), set(only_second)
    changed: Counter[tuple[str, ...]] = Counter()
    for lines, a, b in pairs:
        if a in left and b in right:
            left.remove(a)
            right.remove(b)
            changed[lines] += 1
    kept = (tuple(name for name in names if name in rest) for names, rest in ((first, left), (second, right)))
    return Difference(len(first) - len(only_first), dict(changed.most_common()), *kept)


def _lines(one: Config, other: Config) -> list[str]:
    return [line for line in differences(one, other) if not line.startswith(("data.source:", "data.workers:"))]
