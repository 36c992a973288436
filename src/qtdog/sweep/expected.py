"""A study's numbers beside those that are expected of it, such as the table of a paper."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError, nearest
from qtdog.runs.folder import RunFolder
from qtdog.runs.statistics import estimate
from qtdog.sweep.plan import Plan, Task
from qtdog.sweep.runner import is_done
from qtdog.sweep.study import EXPECTED_MEASURES, Study

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
