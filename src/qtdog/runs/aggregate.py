"""The only aggregation of finished runs: selection → mean ± standard error by method and domain, pairs of methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qtdog.core.errors import ConfigError, unknown
from qtdog.runs.finished import NO_TARGET, Cost, FinishedRun, Selected, label_rows
from qtdog.runs.selection import SELECTIONS, WINDOW, apply_selection, saved_too_early, why_unmeasured
from qtdog.runs.statistics import (
    Comparison,
    Condition,
    Estimate,
    Replicate,
    average_over_targets,
    by_target,
    compare_pairs,
    complete,
    estimate,
    pair_up,
    replicate,
)

AVERAGE, WORST, SOURCE, GAP = "average", "worst domain", "source", "gap"
SPLITS = {"whole": "the whole unseen domain", "80": "the 80 % split of the unseen domain that DomainBed reports"}

Measured = dict[Condition, Selected]


@dataclass(frozen=True)
class MethodSummary:
    """One method.

    Attributes:
        method: its label.
        cells: by name of a column, accuracies and the gap as fractions.
        n_trials: number of replicates (trial and seed, or those of an ensemble's members).
        n_models: models trained for one cell: members of an ensemble, settings that were tried.
        cost: of one model.
    """

    method: str
    cells: dict[str, Estimate]
    n_trials: int
    n_models: int
    cost: Cost


@dataclass(frozen=True)
class Aggregate:
    """The numbers of one table.

    Attributes:
        dataset: what was measured on.
        selection: how checkpoints were selected, a name of `runs.selection.SELECTIONS`.
        split: `whole` or `80`.
        columns: of `MethodSummary.cells`, in order.
        rows: in order of appearance; a method that this selection does not apply to is left out.
        notes: what a reader must know.
    """

    dataset: str
    selection: str
    split: str
    columns: list[str]
    rows: list[MethodSummary]
    notes: list[str]

    @property
    def title(self) -> str:
        """What is in the table, in one line."""
        return f"{self.dataset}: accuracy (%) on {SPLITS[self.split]}, selection '{self.selection}'"

    @property
    def legend(self) -> str:
        """How checkpoints were selected, in one line."""
        return f"{self.selection}: {SELECTIONS[self.selection]}."


def aggregate(runs: Sequence[FinishedRun], selection: str, *, split: str = "whole", pooled: bool = False) -> Aggregate:
    """Return the numbers of a table in DomainBed's layout.

    A domain's cell is the mean over replicates; average, source and gap are the mean over the domains' means
    (`runs.statistics.average`), the worst domain is the minimum within each replicate that has every domain.

    Args:
        runs: of one data set.
        selection: a name of `runs.selection.SELECTIONS`.
        split: `whole` or `80`.
        pooled: one row per method; of several settings in one trial, take the one with the best score of the selection
            (DomainBed's search for hyper-parameters).
    """
    tested = [run for run in runs if run.target != NO_TARGET]
    targets = sorted({run.target for run in tested})
    rows, left_out, early = [], Counter[str](), 0
    for label, group in label_rows(tested, pooled=pooled).items():
        measured = measure(group, selection, split=split, pooled=pooled, left_out=left_out)
        early += sum(selection == run.selection and saved_too_early(run) for run in group)
        if measured:
            n_models = group[0].cost.n_models * (_most_settings(group) if pooled or _is_domainbed(group) else 1)
            cells = summarize(measured, targets, split)
            n_trials = len({condition.replicate for condition in measured})
            rows.append(MethodSummary(label, cells, n_trials, n_models, group[0].cost))
    untested = len(runs) - len(tested)
    if untested:
        left_out["trained on every domain, so that none was unseen"] += untested
    columns = table_columns(targets)
    name = runs[0].dataset if runs else ""
    return Aggregate(name, selection, split, columns, rows, notes(rows, targets, selection, left_out, early))


def table_columns(targets: Sequence[str]) -> list[str]:
    """Return the columns of a table over some unseen domains."""
    return [*targets, *([AVERAGE, WORST] if len(targets) > 1 else []), SOURCE, GAP]


def measure(
    group: Sequence[FinishedRun],
    selection: str,
    *,
    split: str = "whole",
    pooled: bool = False,
    left_out: Counter[str] | None = None,
) -> Measured:
    """Return what a selection gives for the runs of one row, by unseen domain and replicate.

    Args:
        group: the runs.
        selection: a name of `runs.selection.SELECTIONS`.
        split: `whole` or `80`; runs without an accuracy on it are left out.
        pooled: as in `aggregate`. DomainBed's runs are always searched.
        left_out: gets the number of runs left out by reason.
    """
    measured: Measured = {}
    reasons: Counter[str] = Counter() if left_out is None else left_out
    for run in group:
        selected = apply_selection(run, selection)
        if selected is None or selected.on(split) is None:
            reasons[why_unmeasured(run, selection)] += 1
            continue
        search = pooled or run.kind == "domainbed"
        condition = Condition(run.target, _trial_alone(run.replicate) if search else run.replicate)
        held = measured.get(condition)
        if held is not None and not search:
            reasons["repeated with the settings, trial and seed of another (first one kept)"] += 1
        elif held is None or _score(selected) > _score(held):
            measured[condition] = selected
    return measured


def _trial_alone(one: Replicate) -> Replicate:
    return replicate((member.trial, 0) for member in one.members)


def _score(selected: Selected) -> float:
    return -1.0 if selected.score is None else selected.score


def summarize(measured: Measured, targets: Sequence[str], split: str = "whole") -> dict[str, Estimate]:
    """Return the cells of one row: each unseen domain, then average, worst domain, source and gap.

    Args:
        measured: of one method.
        targets: all unseen domains of the table.
        split: `whole` or `80`.
    """

    def values(value: Callable[[Selected], float | None]) -> dict[Condition, float]:
        known = {condition: value(selected) for condition, selected in measured.items()}
        return {condition: one for condition, one in known.items() if one is not None}

    on_target = values(lambda one: one.on(split))
    cells = by_target(on_target, targets)
    cells[AVERAGE] = average_over_targets(on_target, targets)
    cells[WORST] = estimate(min(row) for row in complete(on_target, targets))
    cells[SOURCE] = average_over_targets(values(lambda one: one.source), targets)
    cells[GAP] = average_over_targets(values(lambda one: _gap(one, split)), targets)
    return cells


def _gap(one: Selected, split: str) -> float | None:
    target = one.on(split)
    return None if one.source is None or target is None else one.source - target


def _is_domainbed(group: Sequence[FinishedRun]) -> bool:
    return group[0].kind == "domainbed"


def _most_settings(group: Sequence[FinishedRun]) -> int:
    """Return how many settings stand behind one cell, at most."""
    return max(Counter((run.target, _trial_alone(run.replicate)) for run in group).values())


def notes(
    rows: Sequence[MethodSummary], targets: Sequence[str], selection: str, left_out: Mapping[str, int], early: int = 0
) -> list[str]:
    """Return the sentences of a table's caption.

    Args:
        rows: of the table.
        targets: its unseen domains.
        selection: a name of `runs.selection.SELECTIONS`.
        left_out: reason → number of runs that are in no cell.
        early: number of float runs whose model file is from before the window.
    """
    lines = [WINDOW] if selection in ("source", "oracle") else []
    if early:
        lines.append(
            f"{_count(early, 'float run')} saved an earlier checkpoint: the table has the one selected in this window."
        )
    if any(row.n_trials > 1 for row in rows):
        lines.append("± is the standard error over trials (population standard deviation / √trials).")
    if any(row.n_trials == 1 for row in rows):
        lines.append("A row of one trial has no ±: it says nothing about chance.")
    if len(targets) > 1:
        lines.append("average: mean of the unseen domains' means, each counting alike.")
        if any(
            row.n_trials > 1 and row.cells[AVERAGE].mean is not None and row.cells[AVERAGE].error is None
            for row in rows
        ):
            lines.append("An average without ± has trials that lack a domain.")
        if any(row.cells[WORST].mean is None for row in rows):
            lines.append(
                "The average needs every unseen domain of the table, the worst domain a trial that has them all."
            )
    if any(row.n_models > 1 for row in rows):
        lines.append("models: trained for one cell (members of an ensemble, settings of a search).")
    lines += [f"Left out: {n} {reason}." for reason, n in left_out.items() if n]
    return lines


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def compare_methods(
    runs: Sequence[FinishedRun], names: tuple[str, str], selection: str, *, split: str = "whole", pooled: bool = False
) -> Comparison | None:
    """Return the comparison of two rows of a table; None if they have no pair under this selection.

    Args:
        runs: of one data set.
        names: labels of the rows A and B.
        selection: a name of `runs.selection.SELECTIONS`.
        split: `whole` or `80`.
        pooled: as in `aggregate`.

    Raises:
        ConfigError: a label that no row has, with the nearest one.
    """
    rows = label_rows([run for run in runs if run.target != NO_TARGET], pooled=pooled)
    for name in names:
        if name not in rows:
            raise ConfigError(unknown("row", name, rows))
    first, second = (accuracies(measure(rows[name], selection, split=split, pooled=pooled), split) for name in names)
    return compare_pairs(pair_up(first, second), selection)


def accuracies(measured: Measured, split: str = "whole") -> dict[Condition, float]:
    """Return the accuracies on the unseen domains."""
    known = {condition: selected.on(split) for condition, selected in measured.items()}
    return {condition: value for condition, value in known.items() if value is not None}
