"""One table in DomainBed's layout: a row per method, a column per unseen domain, one way to choose checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtdog.report.labels import label_rows
from qtdog.report.table import NO_TARGET
from qtdog.runs.aggregate import Estimate, estimate
from qtdog.runs.entry import Cost, Entry, Outcome
from qtdog.runs.selection import SELECTIONS, outcome

AVERAGE, WORST, SOURCE, GAP = "average", "worst domain", "source", "gap"
SPLITS = {"whole": "the whole unseen domain", "80": "the 80 % split of the unseen domain that DomainBed reports"}

Trial = tuple[int, int]
Measured = dict[tuple[str, Trial], Outcome]


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: its label.
        cells: by name of a column, accuracies and the gap as fractions.
        n_trials: how many (trial, seed) stand behind it.
        n_models: models trained for one cell: members of an ensemble, settings that were tried.
        cost: of one model.
    """

    method: str
    cells: dict[str, Estimate]
    n_trials: int
    n_models: int
    cost: Cost


@dataclass(frozen=True)
class Block:
    """One table.

    Attributes:
        dataset: what was measured on.
        selection: how checkpoints were chosen, a name of `chosen.SELECTIONS`.
        split: `whole` or `80`.
        columns: of `Row.cells`, in order.
        rows: in order of appearance; a method that this selection does not apply to is left out.
        notes: what a reader must know.
    """

    dataset: str
    selection: str
    split: str
    columns: list[str]
    rows: list[Row]
    notes: list[str]

    @property
    def title(self) -> str:
        """What is in the table, in one line."""
        return f"{self.dataset}: accuracy (%) on {SPLITS[self.split]}, selection '{self.selection}'"

    @property
    def legend(self) -> str:
        """How checkpoints were chosen, in one line."""
        return f"{self.selection}: {SELECTIONS[self.selection]}."


def make_block(entries: Sequence[Entry], selection: str, *, split: str = "whole", pooled: bool = False) -> Block:
    """Return the table of entries of one data set.

    Each domain's cell is the mean over trials. Average, worst domain, source and gap are taken within each trial that
    has every domain, then averaged over these trials.

    Args:
        entries: of one data set.
        selection: a name of `chosen.SELECTIONS`.
        split: `whole` or `80`.
        pooled: one row per method; of several settings in one trial, take the one with the best selection score
            (DomainBed's search for hyper-parameters).
    """
    tested = [entry for entry in entries if entry.target != NO_TARGET]
    targets = sorted({entry.target for entry in tested})
    columns = [*targets, *([AVERAGE, WORST] if len(targets) > 1 else []), SOURCE, GAP]
    rows, n_same = [], 0
    for label, group in label_rows(tested, pooled=pooled).items():
        measured, n_dropped = _measure(group, selection, split, pooled)
        n_same += n_dropped
        if measured:
            cells = _cells(measured, targets, split)
            n_models = group[0].cost.n_models * (_most_settings(group) if pooled or _is_domainbed(group) else 1)
            n_trials = len({trial for _, trial in measured})
            rows.append(Row(label, {name: cells[name] for name in columns}, n_trials, n_models, group[0].cost))
    notes = _notes(rows, targets, n_same, [entry for entry in entries if entry.target == NO_TARGET])
    return Block(entries[0].dataset, selection, split, columns, rows, notes)


def outcomes(entries: Sequence[Entry], selection: str, *, split: str = "whole", pooled: bool = False) -> Measured:
    """Return the outcomes of one row by (target, trial), as `make_block` averages them."""
    return _measure(entries, selection, split, pooled)[0]


def _measure(group: Sequence[Entry], selection: str, split: str, pooled: bool) -> tuple[Measured, int]:
    """Return outcomes by (target, trial), and how many were left out because their place was taken."""
    measured: Measured = {}
    n_same = 0
    for entry in group:
        found = outcome(entry, selection)
        if found is None or found.on(split) is None:
            continue
        search = pooled or entry.kind == "domainbed"
        place = (entry.target, (entry.trial, 0 if search else entry.seed))
        held = measured.get(place)
        n_same += held is not None and not search
        if held is None or (search and _score(found, selection, split) > _score(held, selection, split)):
            measured[place] = found
    return measured, n_same


def _score(found: Outcome, selection: str, split: str) -> float:
    value = found.on(split) if selection == "oracle" else found.source
    return -1.0 if value is None else value


def _cells(measured: Measured, targets: Sequence[str], split: str) -> dict[str, Estimate]:
    trials = dict.fromkeys(trial for _, trial in measured)
    whole = [[measured[target, t] for target in targets] for t in trials if all((g, t) in measured for g in targets)]

    def within(reduce: Callable[[list[float]], float], value: Callable[[Outcome], float | None]) -> Estimate:
        per_trial = [[value(one) for one in trial] for trial in whole]
        return estimate([None if None in values else reduce(values) for values in per_trial])  # type: ignore[arg-type]

    cells = {
        target: estimate([measured[target, trial].on(split) for trial in trials if (target, trial) in measured])
        for target in targets
    }
    cells[AVERAGE] = within(_mean, lambda one: one.on(split))
    cells[WORST] = within(min, lambda one: one.on(split))
    cells[SOURCE] = within(_mean, lambda one: one.source)
    cells[GAP] = within(_mean, lambda one: _gap(one, split))
    return cells


def _gap(one: Outcome, split: str) -> float | None:
    target = one.on(split)
    return None if one.source is None or target is None else one.source - target


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_domainbed(group: Sequence[Entry]) -> bool:
    return group[0].kind == "domainbed"


def _most_settings(group: Sequence[Entry]) -> int:
    """Return how many settings stand behind one cell, at most."""
    places = [(entry.target, entry.trial) for entry in group]
    return max(places.count(place) for place in set(places))


def _notes(rows: Sequence[Row], targets: Sequence[str], n_same: int, untested: Sequence[Entry]) -> list[str]:
    notes = []
    if any(row.n_trials > 1 for row in rows):
        notes.append("± is the standard error over trials (population standard deviation / √trials).")
    if any(row.n_trials == 1 for row in rows):
        notes.append("A row of one trial has no ±: it says nothing about chance.")
    if len(targets) > 1 and any(row.cells[AVERAGE].mean is None for row in rows):
        notes.append("Average, worst domain, source and gap need a trial with every unseen domain of the table.")
    if any(row.n_models > 1 for row in rows):
        notes.append("models: trained for one cell (members of an ensemble, settings of a search).")
    if n_same:
        notes.append(f"Left out: {n_same} repeated with the settings, trial and seed of another (first one kept).")
    if untested:
        notes.append(f"Left out: {len(untested)} trained on every domain, so that none was unseen.")
    return notes
