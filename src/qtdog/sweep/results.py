"""What a finished study says, as plain data: a value per run, comparisons, and its numbers beside expected ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError, nearest, unknown
from qtdog.core.safe_text import read_json
from qtdog.runs.find import read_run
from qtdog.runs.finished import study_method
from qtdog.runs.folder import RunFolder
from qtdog.runs.index import COLUMNS, IndexRow, finished_row
from qtdog.runs.selection import apply_selection
from qtdog.runs.statistics import Comparison, Condition, compare_pairs, estimate, pair_up, replicate
from qtdog.sweep.plan import Plan, Task
from qtdog.sweep.runner import is_done
from qtdog.sweep.study import EXPECTED_MEASURES, Study

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


NOT_OURS = ("mean_of_five",)  # measures that no single data set can give
HEADERS = ["method", "measured on", "expected", "ours", "difference", "from"]


@dataclass(frozen=True)
class ExpectedRow:
    """What is expected of one method or ensemble.

    Attributes:
        name: in the study.
        title: in tables.
        values: measure → accuracy in %. A measure is a name in `EXPECTED_MEASURES`; `unseen/DOMAIN` is of one domain.
        members: how many runs make the ensemble that is measured; 1 for the mean of single runs.
        not_run: why it is no run of the study; "" if it is one.
        note: what else differs.
    """

    name: str
    title: str
    values: Mapping[str, float]
    members: int = 1
    not_run: str = ""
    note: str = ""


def expected_rows(study: Study, only: Sequence[str] = ()) -> list[ExpectedRow]:
    """Return what is expected of the methods in `only`, or of all if it is empty, in the study's order.

    Raises:
        ConfigError: nothing is expected of such a method, with the nearest one.
    """
    members = {one.name: max(len(set(group)) for group in one.members) for one in study.ensembles}
    rows = []
    for name, values in study.expected.items():
        method = study.methods.get(name)
        title, note = (method.title or name, method.about) if method else (name, "")
        rows.append(ExpectedRow(name, title, values, members.get(name, 1), study.not_run.get(name, ""), note))
    known = {text.lower(): text for row in rows for text in (row.name, row.title)}
    for name in only:
        if name.lower() not in known:
            close = nearest(name, known.values())
            hint = f"; did you mean '{close}'?" if close else "."
            titles = ", ".join(dict.fromkeys(row.title for row in rows))
            raise ConfigError(f"{study.name} has no method '{name}'{hint} It has {titles}")
    wanted = {name.lower() for name in only} or set(known)
    return [row for row in rows if wanted & {row.name.lower(), row.title.lower()}]


def tasks_of_row(plan: Plan, row: ExpectedRow, n_trials: int | None = None) -> list[Task]:
    """Return the runs or ensembles that a row is the mean of; of single runs those of the first `n_trials` trials."""
    return [
        task
        for task in plan.tasks
        if any(labels["method"] == row.name for labels in task.labels)
        and (n_trials is None or task.config is None or task.config.data.trial < n_trials)
    ]


@dataclass(frozen=True)
class Line:
    """One expected number, and ours.

    Attributes:
        method: as tables call it.
        measure: a name in `EXPECTED_MEASURES`, perhaps with "/" and a domain.
        expected: accuracy, %.
        ours: mean over the trials that are complete, %; None if there is none yet.
        error: standard error of that mean; None below two trials.
        source: how many runs there are, or why there is none.
        note: what else differs.
    """

    method: str
    measure: str
    expected: float
    ours: float | None
    error: float | None
    source: str
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Ours less what is expected, in points; None where they are not the same kind of number."""
        return None if self.ours is None or self.measure in NOT_OURS else self.ours - self.expected

    def cells(self) -> list[str]:
        """Return the line as cells of a table with `HEADERS`."""
        name, _, domain = self.measure.partition("/")
        ours = "–" if self.ours is None else f"{self.ours:.1f}" + (f" ± {self.error:.1f}" if self.error else "")
        difference = "–" if self.difference is None else f"{self.difference:+.1f}"
        where = domain or EXPECTED_MEASURES[name]
        return [self.method, where, f"{self.expected:.1f}", ours, difference, self.source]


def compare_with_expected(
    plan: Plan, out: Path, rows: Iterable[ExpectedRow], n_trials: int | None = None
) -> list[Line]:
    """Return the lines of a table: what is expected of each row, and the mean of the study's finished runs.

    Args:
        plan: of the study.
        out: folder of its runs.
        rows: from `expected_rows`.
        n_trials: single runs count of the first so many trials; None for all. An ensemble has its own members.

    Raises:
        RunError: a result cannot be read.
    """
    lines = []
    for row in rows:
        trials: dict[tuple[tuple[int, int], ...], dict[str, dict[str, Any]]] = {}
        targets = set()
        for task in tasks_of_row(plan, row, n_trials):
            members = [config for name in (task.needs or (task.name,)) if (config := plan[name].config) is not None]
            config = members[0] if task.config is None else task.config
            members = members if task.kind == "ensemble" else [config]
            results = trials.setdefault(tuple((one.data.trial, one.train.seed) for one in members), {})
            targets.add(config.data.target)
            result = RunFolder(task.folder(out)).read_result() if is_done(task, out) else None
            if result is not None:
                results[config.data.target] = result
        lines += row_lines(row, list(trials.values()), len(targets))
    return lines


def row_lines(row: ExpectedRow, trials: Sequence[Mapping[str, dict[str, Any]]], n_targets: int) -> list[Line]:
    """Return the lines of a row.

    Args:
        row: what is expected.
        trials: for each trial the results by target, as far as there are any; an ensemble is one trial.
        n_targets: how many targets a complete trial has.
    """
    lines = []
    for measure, expected in row.values.items():
        name, _, domain = measure.partition("/")
        n_needed = 1 if domain else n_targets
        by_trial = [[result for target, result in trial.items() if domain in ("", target)] for trial in trials]
        complete = [trial for trial in by_trial if len(trial) == n_needed]
        ours = estimate([100 * statistics.fmean(value_of(result, name) for result in trial) for trial in complete])
        what = "runs" if row.members == 1 else f"ensembles of {row.members}"
        counts = f"{sum(map(len, by_trial))} of {n_needed * max(len(trials), 1)} {what}"
        lines.append(Line(row.title, measure, expected, ours.mean, ours.error, row.not_run or counts, row.note))
    return lines


def value_of(result: Mapping[str, Any], measure: str) -> float:
    """Return what a result says of a measure, as a share.

    Of a single run `unseen` is the accuracy on the 80 % of the unseen domain that DomainBed's protocol trains on when
    it is a source, as single models are published; of an ensemble it is that on the whole domain.

    Example:
        >>> value_of({"test_accuracy": 0.5, "test_accuracy_80": {"sketch": 0.25}}, "unseen")
        0.25
    """
    if measure == "source":
        return result["source_accuracy"]
    if measure.startswith("percentile_10"):
        return result["groups"][measure.removeprefix("percentile_10_")]["percentile_10"]
    part = result.get("test_accuracy_80")
    if measure in ("unseen", *NOT_OURS) and part and "members" not in result:
        return next(iter(part.values()))
    return result["test_accuracy"]
