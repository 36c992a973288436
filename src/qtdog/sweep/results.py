"""What a finished study says, as plain data: a value per run, earlier tables, and the pairs of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.safe_text import read_json
from qtdog.runs.find import read_run
from qtdog.runs.finished import study_method
from qtdog.runs.index import COLUMNS, IndexRow, finished_row
from qtdog.runs.selection import apply_selection
from qtdog.runs.statistics import Comparison, Condition, compare_pairs, pair_up, replicate
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


def read_earlier(files: Sequence[Path]) -> dict[str, IndexRow]:
    """Return what earlier tables say of runs, by the name of the run's folder: its configuration's hash.

    Since the name is the hash, a row counts for no other configuration than the one that was measured. Of a run that is
    in several files the first one counts.

    Args:
        files: written by `qtdog sweep table --format json`.

    Raises:
        ConfigError: a file that is not there or no such table.
    """
    rows: dict[str, IndexRow] = {}
    for file in files:
        for row in _read(file):
            rows.setdefault(Path(str(row["folder"])).name, row)
    return rows


def _read(file: Path) -> list[IndexRow]:
    if not file.is_file():
        raise ConfigError(f"--also {file} does not exist")
    try:
        return [_checked(row) for row in read_json(file.resolve(), kind=ConfigError)["runs"]]
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        text = f"--also {file} is no table of a study ({error!r})"
        raise ConfigError(f"{text}; qtdog sweep table STUDY --format json makes one") from error


def _checked(row: Any) -> IndexRow:
    kept = {name: row.get(name) for name in KEPT} if isinstance(row, dict) else {}
    wrong = [name for name, value in kept.items() if not _fits(name, value)]
    if wrong or not kept.get("folder"):
        raise ValueError(f"a run with a wrong {wrong[0] if wrong else 'folder'}")
    return kept


def _fits(name: str, value: Any) -> bool:
    return value is None or (isinstance(value, TYPES[COLUMNS[name]]) and not isinstance(value, bool))


# What is compared: the column of a run, and what it is called in tables.
MEASURES = {
    "test_accuracy": "unseen, selected checkpoint",
    "mean_after_start": "unseen, mean over the evaluations after the start step",
    "source_accuracy": "validation images of the sources, selected checkpoint",
}
Values = dict[str, dict[Condition, float]]  # method → unseen domain and replicate → accuracy


@dataclass(frozen=True)
class Result:
    """One finished run of a study.

    Attributes:
        method: the study's name for it, with the values of axes that only this method varies.
        condition: the unseen domain and the replicate (trial and seed, of an ensemble those of its members); pairs
            agree in both.
        row: what tables know of it.
    """

    method: str
    condition: Condition
    row: IndexRow


def results(plan: Plan, out: Path, earlier: Mapping[str, IndexRow] | None = None) -> list[Result]:
    """Return every finished run and ensemble of a study, in the study's order; one for each name that it has.

    Args:
        plan: of the study.
        out: its folder.
        earlier: rows of runs that count where the folder has not finished them (`read_earlier`).

    Raises:
        RunError: a folder that does not hold what a finished run writes.
    """
    configs = {task.name: task.config for task in plan.tasks}
    finished = []
    for task in plan.tasks:
        row = None if task.kind == "fork_point" else _row(task, out, earlier or {})
        if row is None:
            continue
        names = task.needs if task.kind == "ensemble" else (task.name,)
        members = [config for name in names if (config := configs[name]) is not None]
        pairs = [(config.data.trial, config.train.seed) for config in members]
        for labels in task.labels:
            draw = labels.get("draw")
            condition = Condition(
                str(labels.get("target", row["target"])), replicate(pairs, draw if isinstance(draw, int) else None)
            )
            finished.append(Result(study_method(labels), condition, row))
    return finished


def _row(task: Task, out: Path, earlier: Mapping[str, IndexRow]) -> IndexRow | None:
    run = read_run(task.folder(out)) if is_done(task, out) else None
    if run is None:
        return earlier.get(task.name)
    selected = apply_selection(run, run.selection)
    row = finished_row(run)
    if selected is None:
        return row
    # as in `qtdog table`: of a float run, the checkpoint from the window that quantized runs select from
    return row | {
        "selected_step": row["selected_step"] if selected is run.saved else selected.step,
        "source_accuracy": selected.source,
        "test_accuracy": selected.target,
    }


def values(finished: Sequence[Result], measure: str) -> Values:
    """Return the values by method and condition, in the order of `finished`; what was not measured is left out.

    Args:
        finished: from `results`.
        measure: a name of `MEASURES`.
    """
    table: Values = {}
    for one in finished:
        value = one.row.get(measure)
        if isinstance(value, (int, float)):
            table.setdefault(one.method, {})[one.condition] = float(value)
    return table


def targets_of(table: Values) -> list[str]:
    """Return the unseen domains of a table, sorted."""
    return sorted({condition.target for values in table.values() for condition in values})


def comparisons(table: Values, reference: str) -> dict[str, Comparison]:
    """Return by method its comparison with the reference, over the conditions that both have.

    An ensemble is compared with the mean of the reference's runs with the trials and seeds of its members.

    Raises:
        ConfigError: no such reference, with the nearest one.
    """
    if reference not in table:
        raise ConfigError(unknown("method", reference, table))
    made = {
        method: compare_pairs(pair_up(table[reference], values))
        for method, values in table.items()
        if method != reference
    }
    return {method: one for method, one in made.items() if one is not None}
