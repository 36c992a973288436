"""What a finished study says, as plain data: a value per run, earlier tables, and the pairs of a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError, unknown
from qtdog.sweep.index import COLUMNS, Row, read_row
from qtdog.sweep.plan import Plan, Task
from qtdog.sweep.runner import is_done

# What a table's JSON says of each run, beside the method.
KEPT = (
    "folder",
    "target",
    "seed",
    "trial",
    "selected_step",
    "size_bytes",
    "trained_s",
    "bits",
    "start_step",
    "source_accuracy",
    "test_accuracy",
    "mean_after_start",
    "std_after_start",
)
TYPES = {"TEXT": str, "TEXT PRIMARY KEY": str, "INTEGER": int, "REAL": (int, float)}


def read_earlier(files: Sequence[Path]) -> dict[str, Row]:
    """Return what earlier tables say of runs, by the name of the run's folder: its configuration's hash.

    Since the name is the hash, a row counts for no other configuration than the one that was measured. Of a run that is
    in several files the first one counts.

    Args:
        files: written by `qtdog sweep table --format json`.

    Raises:
        ConfigError: a file that is not there or no such table.
    """
    rows: dict[str, Row] = {}
    for file in files:
        for row in _read(file):
            rows.setdefault(Path(str(row["folder"])).name, row)
    return rows


def _read(file: Path) -> list[Row]:
    try:
        return [_checked(row) for row in json.loads(file.read_text())["runs"]]
    except FileNotFoundError as error:
        raise ConfigError(f"--also {file} does not exist") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"--also {file} is no table of a study ({error!r})"
        raise ConfigError(f"{text}; qtdog sweep table STUDY --format json makes one") from error


def _checked(row: Any) -> Row:
    found = {name: row.get(name) for name in KEPT} if isinstance(row, dict) else {}
    wrong = [name for name, value in found.items() if not _fits(name, value)]
    if wrong or not found.get("folder"):
        raise ValueError(f"a run with a wrong {wrong[0] if wrong else 'folder'}")
    return found


def _fits(name: str, value: Any) -> bool:
    return value is None or (isinstance(value, TYPES[COLUMNS[name]]) and not isinstance(value, bool))


# What is compared: the column of a run, and what it is called in tables.
MEASURES = {
    "test_accuracy": "unseen, selected checkpoint",
    "mean_after_start": "unseen, mean over the evaluations after the start step",
    "source_accuracy": "held-out images of the sources, selected checkpoint",
}
REPLICATES = ("seed", "trial", "draw")


@dataclass(frozen=True)
class Result:
    """One finished run of a study.

    Attributes:
        method: the study's name for it, with the values of axes that only this method varies.
        target: the unseen domain.
        replicate: the values by which runs of one method and target differ; pairs agree in it.
        row: all that the index knows of it.
    """

    method: str
    target: str
    replicate: tuple[object, ...]
    row: Row


def results(plan: Plan, out: Path, earlier: Mapping[str, Row] | None = None) -> list[Result]:
    """Return every finished run and ensemble of a study, in the study's order; one for each name that it has.

    Args:
        plan: of the study.
        out: its folder.
        earlier: rows of runs that count where the folder has not finished them (`sweep.results.read_earlier`).
    """
    found = []
    for task in plan.tasks:
        row = None if task.kind == "fork_point" else _row(task, out, earlier or {})
        if row is None:
            continue
        for labels in task.labels:
            replicate = tuple(value for name, value in labels.items() if set(_names(name)) & set(REPLICATES))
            found.append(Result(_method(labels), str(labels.get("target", row["target"])), replicate, row))
    return found


def _row(task: Task, out: Path, earlier: Mapping[str, Row]) -> Row | None:
    own = read_row(task.folder(out)) if is_done(task, out) else None
    return own or earlier.get(task.name)


def _names(axis: str) -> list[str]:
    return [name.strip() for name in axis.split(",")]


def _method(labels: Mapping[str, object]) -> str:
    own = [f"{name.rpartition('.')[2]}={value}" for name, value in labels.items() if not _is_common(name)]
    return " ".join([str(labels["method"]), *own])


def _is_common(axis: str) -> bool:
    return axis == "method" or bool(set(_names(axis)) & {"target", *REPLICATES})


def values(found: Sequence[Result], measure: str) -> dict[str, dict[str, dict[tuple[object, ...], float]]]:
    """Return method → target → replicate → value, in the order of `found`; what was not measured is left out.

    Args:
        found: from `results`.
        measure: a name of `MEASURES`.
    """
    table: dict[str, dict[str, dict[tuple[object, ...], float]]] = {}
    for one in found:
        value = one.row.get(measure)
        if isinstance(value, (int, float)):
            table.setdefault(one.method, {}).setdefault(one.target, {})[one.replicate] = float(value)
    return table


def pairs(
    table: Mapping[str, Mapping[str, Mapping[tuple[object, ...], float]]], reference: str
) -> Iterator[tuple[str, list[float], list[float]]]:
    """Yield (method, values of the reference, values of the method) over the targets and replicates that both have.

    Raises:
        ConfigError: no such reference, with the nearest one.
    """
    if reference not in table:
        raise ConfigError(unknown("method", reference, table))
    base = table[reference]
    for method, targets in table.items():
        shared = [
            (base[target][replicate], value)
            for target, runs in targets.items()
            for replicate, value in runs.items()
            if replicate in base.get(target, {})
        ]
        if method != reference and shared:
            first, second = zip(*shared, strict=True)
            yield method, list(first), list(second)
