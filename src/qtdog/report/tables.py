"""Results as one table model in DomainBed's layout: rows per method, columns per unseen domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtdog.runs.aggregate import Estimate, estimate
from qtdog.runs.finished import NO_TARGET, Cost, FinishedRun, Selected, unseen
from qtdog.runs.selection import SELECTIONS, apply_selection


def percent(value: float | None) -> str:
    """Return an accuracy in percent with one decimal, or a dash.

    Example:
        >>> percent(0.876), percent(None)
        ('87.6', '–')
    """
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"  # + 0.0: no minus before a zero


def size_text(size: Mapping[str, float]) -> str:
    """Return bytes and ratio to float32 for people.

    Example:
        >>> size_text({"bytes": 3_345_000, "ratio": 4.06})
        '3.35 MB (4.06x smaller)'
    """
    text = f"{size['bytes'] / 1e6:.3g} MB"
    return f"{text} ({size['ratio']:.2f}x smaller)" if size["ratio"] > 1.005 else text


def target_table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows: a row per method, a column per unseen domain, then averages and size.

    Args:
        results: for each method its results (`result.json`), one or more per target; several for one target (members)
            are averaged.
    """
    targets = sorted({unseen(result) for runs in results.values() for result in runs})
    headers = ["method", *targets, "average", "source", "file"]
    rows = []
    for method, runs in results.items():
        per_target = [_mean(run["test_accuracy"] for run in runs if unseen(run) == t) for t in targets]
        source = _mean(run["source_accuracy"] for run in runs)
        rows.append(
            [method, *map(percent, per_target), percent(_mean(per_target)), percent(source), size_text(runs[0]["size"])]
        )
    return headers, rows


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a Markdown table; a cell cannot break out of it.

    Example:
        >>> print(markdown(["a"], [["x|y"]]))
        | a |
        | --- |
        | x\|y |
    """
    lines = [headers, ["---"] * len(headers), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


Settings = Mapping[str, Any]


def label_rows(entries: Sequence[FinishedRun], *, pooled: bool = False) -> dict[str, list[FinishedRun]]:
    """Return the entries by row: methods in the order of their first appearance, settings of one by name.

    Args:
        entries: of one data set.
        pooled: make one row of all settings of a method.
    """
    methods: dict[str, list[FinishedRun]] = {}
    for entry in entries:
        methods.setdefault(entry.method, []).append(entry)
    if pooled:
        return methods
    rows: dict[str, list[FinishedRun]] = {}
    for method, group in methods.items():
        labels = setting_labels([method] * len(group), [entry.settings for entry in group])
        for label in sorted(set(labels)):
            rows[label] = [entry for entry, its in zip(group, labels, strict=True) if its == label]
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
        places = [place for place, name in enumerate(methods) if name == method]
        for place, said in zip(places, _said([settings[place] for place in places]), strict=True):
            labels[place] = f"{method} ({said})" if said else method
    return labels


def _said(settings: Sequence[Settings]) -> list[str]:
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


AVERAGE, WORST, SOURCE, GAP = "average", "worst domain", "source", "gap"
SPLITS = {"whole": "the whole unseen domain", "80": "the 80 % split of the unseen domain that DomainBed reports"}

Trial = tuple[int, int]
Measured = dict[tuple[str, Trial], Selected]


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


def make_block(entries: Sequence[FinishedRun], selection: str, *, split: str = "whole", pooled: bool = False) -> Block:
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


def outcomes(entries: Sequence[FinishedRun], selection: str, *, split: str = "whole", pooled: bool = False) -> Measured:
    """Return the outcomes of one row by (target, trial), as `make_block` averages them."""
    return _measure(entries, selection, split, pooled)[0]


def _measure(group: Sequence[FinishedRun], selection: str, split: str, pooled: bool) -> tuple[Measured, int]:
    """Return outcomes by (target, trial), and how many were left out because their place was taken."""
    measured: Measured = {}
    n_same = 0
    for entry in group:
        found = apply_selection(entry, selection)
        if found is None or found.on(split) is None:
            continue
        search = pooled or entry.kind == "domainbed"
        place = (entry.target, (entry.trial, 0 if search else entry.seed))
        held = measured.get(place)
        n_same += held is not None and not search
        if held is None or (search and _score(found, selection, split) > _score(held, selection, split)):
            measured[place] = found
    return measured, n_same


def _score(found: Selected, selection: str, split: str) -> float:
    value = found.on(split) if selection == "oracle" else found.source
    return -1.0 if value is None else value


def _cells(measured: Measured, targets: Sequence[str], split: str) -> dict[str, Estimate]:
    trials = dict.fromkeys(trial for _, trial in measured)
    whole = [[measured[target, t] for target in targets] for t in trials if all((g, t) in measured for g in targets)]

    def within(reduce: Callable[[list[float]], float], value: Callable[[Selected], float | None]) -> Estimate:
        per_trial = [[value(one) for one in trial] for trial in whole]
        return estimate([None if None in values else reduce(values) for values in per_trial])  # type: ignore[arg-type]

    cells = {
        target: estimate([measured[target, trial].on(split) for trial in trials if (target, trial) in measured])
        for target in targets
    }
    cells[AVERAGE] = within(_mean_or_none, lambda one: one.on(split))
    cells[WORST] = within(min, lambda one: one.on(split))
    cells[SOURCE] = within(_mean_or_none, lambda one: one.source)
    cells[GAP] = within(_mean_or_none, lambda one: _gap(one, split))
    return cells


def _gap(one: Selected, split: str) -> float | None:
    target = one.on(split)
    return None if one.source is None or target is None else one.source - target


def _mean_or_none(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_domainbed(group: Sequence[FinishedRun]) -> bool:
    return group[0].kind == "domainbed"


def _most_settings(group: Sequence[FinishedRun]) -> int:
    """Return how many settings stand behind one cell, at most."""
    places = [(entry.target, entry.trial) for entry in group]
    return max(places.count(place) for place in set(places))


def _notes(rows: Sequence[Row], targets: Sequence[str], n_same: int, untested: Sequence[FinishedRun]) -> list[str]:
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


Result = Mapping[str, Any]


def cost_table(results: Mapping[str, Sequence[Result]]) -> tuple[list[str], list[list[str]]]:
    """Return `report.tables.target_table` with a column for training steps and one for forward passes.

    Args:
        results: by the name of a row, results of runs (with `training_steps`) or of ensembles, as in `result.json`; of
            several for one target the accuracies are averaged, and the cost is that of one.
    """
    headers, rows = target_table(results)
    costs = [[file_text(runs[0]["size"]), steps_text(runs[0]), passes_text(runs[0])] for runs in results.values()]
    rows = [[*row[:-1], *cost] for row, cost in zip(rows, costs, strict=True)]
    return [*headers, "training steps", "passes"], rows


def file_text(size: Mapping[str, float]) -> str:
    """Return the size of a file; that of an ensemble beside one of its members in float32.

    Example:
        >>> file_text({"bytes": 16_392_920, "ratio": 0.84, "float32_models": 1.195})
        '16.4 MB (1.20x one float32)'
    """
    if "float32_models" not in size:
        return size_text(size)
    return f"{size['bytes'] / 1e6:.3g} MB ({size['float32_models']:.2f}x one float32)"


def steps_text(result: Result) -> str:
    """Return the updates behind a model, and in lengths of one run if that is another number.

    Example:
        >>> steps_text({"training_steps": 17_000, "training_runs": 3.4})
        '17,000 (3.4 runs)'
    """
    runs = result.get("training_runs", 1.0)
    text = f"{result['training_steps']:,}"
    return text if runs == 1 else f"{text} ({runs:.3g} runs)"


def passes_text(result: Result) -> str:
    """Return the forward passes per image.

    Example:
        >>> passes_text({}), passes_text({"inference_passes": 5})
        ('1', '5')
    """
    return str(result.get("inference_passes", 1))


def cost_line(size: Mapping[str, float], result: Result) -> str:
    """Return size, training and passes of a model in one line.

    Example:
        >>> size = {"bytes": 16_392_920, "ratio": 0.84, "float32_models": 1.195}
        >>> cost_line(size, {"training_steps": 17_000, "training_runs": 3.4, "inference_passes": 5})
        '16.4 MB (1.20x one float32), training steps 17,000 (3.4 runs), forward passes per image 5'
    """
    passes = passes_text(result)
    return f"{file_text(size)}, training steps {steps_text(result)}, forward passes per image {passes}"
