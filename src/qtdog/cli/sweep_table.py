"""`qtdog sweep table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.sweep_flags import DataFolder, OutFolder, StudyFile

if TYPE_CHECKING:
    from qtdog.report.compare import Comparison
    from qtdog.sweep.index import Row
    from qtdog.sweep.plan import Plan
    from qtdog.sweep.results import Result

PLOT = "Draw the differences and their intervals to this file too (.png, .pdf, .svg)."
REFERENCE = "Method that the others are compared with, over the pairs of target and seed that both have."
ALSO = "Count runs of an earlier table (--format json) that the folder lacks; may be given several times."
N_SUMMARY = 4  # columns behind the targets
Cells = Mapping[str, Mapping[str, Mapping[tuple[object, ...], float]]]


class Format(StrEnum):
    """How the tables are written."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON = "json"


def table(
    study: StudyFile,
    *,
    out: OutFolder = None,
    data: DataFolder = None,
    reference: Annotated[str | None, typer.Option(help=f"{REFERENCE} Default: the study's first.")] = None,
    format_: Annotated[Format, typer.Option("--format", help="How the tables are written.")] = Format.TEXT,
    plot: Annotated[Path | None, typer.Option(help=PLOT)] = None,
    also: Annotated[list[Path] | None, typer.Option(metavar="FILE", help=ALSO)] = None,
) -> None:
    """Show what a study says so far: mean ± standard error per method and target, and paired differences.

    Twice: of the selected checkpoint, and of the mean over the evaluations after the start step, since one checkpoint
    swings by several points.

    Examples:
      qtdog sweep table studies/digits.yaml --reference float

      qtdog sweep table studies/digits.yaml --plot differences.png

      qtdog sweep table studies/digits.yaml --also laptop.json --format json
    """
    from qtdog.cli.console import print_json
    from qtdog.cli.sweep_study import open_plan
    from qtdog.core.errors import RunError
    from qtdog.sweep.results import MEASURES, results, values

    plan, folder = open_plan(study, data, out)
    found = results(plan, folder, _earlier(also or [], plan))
    if not found:
        raise RunError(f"no run of the study is finished in {folder}: qtdog sweep {study}")
    name = reference or next(iter(plan.study.methods))
    tables = {measure: values(found, measure) for measure in MEASURES}
    if plot:
        _plot(tables, name, plot)
    if format_ is Format.JSON:
        print_json({measure: _numbers(cells, name) for measure, cells in tables.items()} | {"runs": _runs(found)})
        return
    for measure, title in MEASURES.items():
        if tables[measure]:
            _show(tables[measure], name, f"accuracy (%), {title}", markdown=format_ is Format.MARKDOWN)


def _earlier(files: Sequence[Path], plan: Plan) -> dict[str, Row]:
    from qtdog.cli.console import warn
    from qtdog.sweep.results import read_earlier

    rows = read_earlier(files)
    foreign = len(rows.keys() - {task.name for task in plan.tasks})
    if foreign:
        warn(
            f"{foreign} of the {len(rows)} runs in {', '.join(map(str, files))} are not of this study and do not count"
        )
    return rows


def _runs(found: list[Result]) -> list[dict[str, Any]]:
    from qtdog.sweep.results import KEPT

    return [{"method": one.method} | {name: one.row.get(name) for name in KEPT} for one in found]


def _plot(tables: Mapping[str, Cells], reference: str, path: Path) -> None:
    """Draw what is known of the unseen domains.

    Raises:
        ConfigError: no picture can be written there, or no two methods can be compared.
    """
    from qtdog.core.errors import ConfigError
    from qtdog.report.plots import plot_differences
    from qtdog.sweep.results import MEASURES

    panels = {
        title: compared
        for measure, title in MEASURES.items()
        if measure != "source_accuracy" and (compared := _compared(tables[measure], reference))
    }
    if not panels:
        raise ConfigError(f"no finished run can be compared with one of {reference!r} yet: nothing to draw")
    try:
        plot_differences(panels, reference, path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _compared(cells: Cells, reference: str) -> dict[str, Comparison]:
    from qtdog.report.compare import compare_values
    from qtdog.sweep.results import pairs

    if reference not in cells:
        return {}
    return {method: compare_values(first, second) for method, first, second in pairs(cells, reference)}


def _numbers(cells: Cells, reference: str) -> dict[str, Any]:
    from qtdog.runs.aggregate import estimate

    def numbers(runs: Mapping[tuple[object, ...], float]) -> dict[str, Any]:
        found = estimate(list(runs.values()))
        return {"mean": found.mean, "standard_error": found.error, "n": found.n}

    methods = {method: {target: numbers(runs) for target, runs in targets.items()} for method, targets in cells.items()}
    compared = {
        method: {"mean": one.mean, "low": one.low, "high": one.high, "p_value": one.p_value, "n": one.n}
        for method, one in _compared(cells, reference).items()
    }
    return {"methods": methods, "reference": reference, "differences": compared}


def _show(cells: Cells, reference: str, title: str, *, markdown: bool) -> None:
    from qtdog.cli.console import out, print_table
    from qtdog.report.tables import markdown as to_markdown

    headers, rows = table_rows(cells, reference)
    if markdown:
        typer.echo(f"{title}\n\n{to_markdown(headers, rows)}\n")
        return
    fits = sum(max(map(len, column)) + 2 for column in zip(headers, *rows, strict=True)) + 2 <= out.width
    n_targets = len(headers) - 1 - N_SUMMARY
    shown = range(len(headers)) if fits else [0, *range(1 + n_targets, len(headers))]
    print_table([headers[i] for i in shown], [[row[i] for i in shown] for row in rows], title=title)
    about = f"− {reference}: mean difference over pairs of target and seed, with a 95 % bootstrap interval."
    narrow = "" if fits else " Each target: in a wider window, or with --format markdown."
    out.print(about + narrow, highlight=False, markup=False, soft_wrap=True)


def table_rows(cells: Cells, reference: str) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows: a method each, its mean ± standard error per target, the mean over the targets, runs.

    Args:
        cells: method → target → replicate → accuracy as a fraction.
        reference: the method that differences are to.
    """
    from qtdog.report.text_tables import estimate_text
    from qtdog.runs.aggregate import estimate

    targets = sorted({target for by_target in cells.values() for target in by_target})
    compared = _compared(cells, reference)
    headers = ["method", *targets, "mean", "runs", f"− {reference}", "95 % interval"]
    rows = []
    for method, by_target in cells.items():
        per_target = [estimate(list(by_target.get(target, {}).values())) for target in targets]
        known = [one.mean for one in per_target if one.mean is not None]
        mean = f"{100 * sum(known) / len(known):.1f}" if len(known) == len(targets) else "–"
        row = [method, *(estimate_text(one) for one in per_target), mean, str(sum(one.n for one in per_target))]
        rows.append([*row, *_difference(compared.get(method))])
    return headers, rows


def _difference(one: Comparison | None) -> list[str]:
    if one is None:
        return ["", ""]
    low, high = one.low, one.high
    interval = "" if low is None or high is None else f"{100 * low:+.1f} … {100 * high:+.1f}"
    return [f"{100 * one.mean:+.1f} (n={one.n})", interval]
