"""What a finished study says, as plain data: a value per run, and the pairs of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtdog.core.errors import ConfigError, unknown
from qtdog.sweep.index_row import Row, read_row
from qtdog.sweep.plan import Plan
from qtdog.sweep.state import is_done
from qtdog.sweep.task import Task

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
        earlier: rows of runs that count where the folder has not finished them (`sweep.earlier.read_earlier`).
    """
    found = []
    for task in plan.tasks:
        row = None if task.kind == "prefix" else _row(task, out, earlier or {})
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
