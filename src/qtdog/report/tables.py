"""Numbers of runs as tables: in DomainBed's layout, two methods side by side, and what a command has just made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtdog.core.safe_text import csv_line
from qtdog.report.render import MISSING, Cell, Table
from qtdog.runs.aggregate import GAP, SOURCE, Aggregate, MethodSummary
from qtdog.runs.finished import unseen
from qtdog.runs.statistics import Comparison, Condition, Estimate, average_over_targets, by_target, replicate


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


def estimate_text(value: Estimate) -> str:
    """Return mean and standard error in percent with one decimal.

    Example:
        >>> estimate_text(Estimate(0.876, 0.0032, 3)), estimate_text(Estimate(None, None, 0))
        ('87.6 ± 0.3', '–')
    """
    text = percent(value.mean)
    return text if value.error is None else f"{text} ± {percent(value.error)}"


def summary_table(numbers: Aggregate, id_: str = "", *, with_costs: bool = True) -> Table:
    """Return a table in DomainBed's layout.

    Of each column of unseen domains, their average and the worst the best value is marked, and the second; values that
    read the same are marked alike. Source accuracy and gap are not: a small gap may just be a bad model.
    """
    headers = ["method", *numbers.columns, "trials", *(COSTS if with_costs else ())]
    marks = {name: _marks(numbers, name) for name in numbers.columns}
    rows = [
        [
            Cell(row.method, value=row.method),
            *(_estimate_cell(row.cells[name], marks[name][i]) for name in numbers.columns),
            Cell(str(row.n_trials), value=row.n_trials),
            *(_costs(row) if with_costs else ()),
        ]
        for i, row in enumerate(numbers.rows)
    ]
    return Table(numbers.title, headers, rows, [numbers.legend, *numbers.notes], id_)


COSTS = ("file", "models", "steps", "passes")


def methods_cost_table(tables: Sequence[Aggregate], id_: str = "") -> Table:
    """Return what each method costs: a row for each that any of the tables has."""
    found = {row.method: row for numbers in tables for row in numbers.rows}
    rows = [[Cell(name, value=name), *_costs(row)] for name, row in found.items()]
    return Table(
        "What each method costs: one model file, and the training of all its models", ["method", *COSTS], rows, [], id_
    )


def _estimate_cell(value: Estimate, mark: str) -> Cell:
    return Cell(estimate_text(value), mark, value.mean)


def _marks(numbers: Aggregate, name: str) -> list[str]:
    means = [row.cells[name].mean for row in numbers.rows]
    shown = [None if mean is None or name in (SOURCE, GAP) else float(percent(mean)) for mean in means]
    order = sorted({value for value in shown if value is not None}, reverse=True)
    marks = dict(zip(order, ("best", "second"), strict=False)) if len(order) > 1 else {}
    return ["" if value is None else marks.get(value, "") for value in shown]


def _costs(row: MethodSummary) -> list[Cell]:
    cost = row.cost
    steps = MISSING if cost.training_steps is None else f"{cost.training_steps:,}"
    file = file_text(cost.size) if "bytes" in cost.size else MISSING
    return [
        Cell(file, value=cost.size.get("bytes")),
        Cell(str(row.n_models), value=row.n_models),
        Cell(steps, value=cost.training_steps),
        Cell(str(cost.passes), value=cost.passes),
    ]


def comparison_table(title: str, comparisons: Sequence[Comparison]) -> Table:
    """Return a table with a row per selection; differences in points."""
    headers = ["selection", "pairs", "B − A (points)", "95 % interval", "Wilcoxon p", "B better in"]
    warnings = list(dict.fromkeys(one.warning for one in comparisons if one.warning))
    about = [
        "Pairs of (unseen domain, trial, seed), an ensemble with the mean of the runs with its members' seeds; mean "
        "difference with its t interval, signed-rank test."
    ]
    return Table(title, headers, [_comparison_row(one) for one in comparisons], about + warnings)


def _comparison_row(one: Comparison) -> list[Cell]:
    wins = sum(value > 0 for value in one.differences)
    p_value = MISSING if one.p_value is None else f"{one.p_value:.3g}"
    texts = [one.selection, str(one.n), points_text(one.mean), interval_text(one), p_value, f"{wins} of {one.n}"]
    return [Cell(text) for text in texts]


def interval_text(one: Comparison) -> str:
    """Return the interval of a difference in points, or a dash."""
    return MISSING if one.low is None else f"{points_text(one.low)} … {points_text(one.high)}"


def points_text(value: float | None) -> str:
    """Return a difference of accuracies in points with its sign.

    Example:
        >>> points_text(0.012), points_text(-0.3), points_text(None)
        ('+1.2', '−30.0', '–')
    """
    text = percent(value)
    return f"+{text}" if value is not None and value > 0 and text != "0.0" else text.replace("-", "−")


CSV_COLUMNS = (
    *("dataset", "split", "selection", "method", "column", "mean", "standard_error", "n"),
    *("trials", "models", "steps", "passes", "bytes"),
)


def numbers_csv(tables: Sequence[Aggregate]) -> str:
    """Return one line per table, row and column: percent with six decimals; empty where nothing was measured.

    The columns are `dataset`, `split`, `selection`, `method`, `column`, `mean`, `standard_error`, `n`, and of the row
    `trials`, `models`, `steps`, `passes`, `bytes`.
    """
    lines = [csv_line(CSV_COLUMNS)]
    for numbers in tables:
        for row in numbers.rows:
            cost = [row.n_trials, row.n_models, row.cost.training_steps, row.cost.passes, row.cost.size.get("bytes")]
            for name in numbers.columns:
                cell = row.cells[name]
                about = [numbers.dataset, numbers.split, numbers.selection, row.method, name]
                lines.append(csv_line([*about, _number(cell.mean), _number(cell.error), cell.n, *cost]))
    return "".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.6f}"


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
        accuracies, sources = (_by_condition(runs, key) for key in ("test_accuracy", "source_accuracy"))
        per_target = [one.mean for one in by_target(accuracies, targets).values()]
        averages = [average_over_targets(values, targets).mean for values in (accuracies, sources)]
        rows.append([method, *map(percent, [*per_target, *averages]), size_text(runs[0]["size"])])
    return headers, rows


def _by_condition(runs: Sequence[Mapping[str, Any]], key: str) -> dict[Condition, float]:
    return {Condition(unseen(run), replicate([(0, i)])): run[key] for i, run in enumerate(runs) if run[key] is not None}


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
