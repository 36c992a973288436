"""What `qtdog sweep` shows: a running sweep as a live table or lines, and the table of what a study says."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import DataFolder, RunsFolder, StudyFile

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table as RichTable
    from rich.text import Text

    from qtdog.report.render import Table
    from qtdog.runs.index import IndexRow
    from qtdog.runs.statistics import Comparison, Estimate
    from qtdog.sweep.estimate import Throughput
    from qtdog.sweep.journal import Outcome
    from qtdog.sweep.plan import Plan, Task
    from qtdog.sweep.results import Result, Values
    from qtdog.sweep.runner import SweepProgress as Progress


REFRESH_S = 0.5
N_SHOWN = 20


class ProgressDisplay:
    """Shows the progress of a sweep: counts, what runs, what failed last, time left."""

    def __init__(self, out: Path, live: Live | None) -> None:
        self._out, self._live = out, live
        self._shown = 0.0
        self._pace: Throughput | None = None
        self._warned: set[str] = set()
        self.n_repeated = 0  # warnings that are not printed, since another run said the same

    def show(self, progress: Progress) -> None:
        """Refresh the table, at most twice a second."""
        from rich.console import Group

        from qtdog.sweep.estimate import Throughput

        now = time.monotonic()
        if self._live is None or now - self._shown < REFRESH_S:
            return
        self._shown = now
        self._pace = self._pace or Throughput(progress.tasks, self._out)
        self._live.update(Group(self._running(progress), self._counts(progress)), refresh=True)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Count one task's end and print what it warned of; print the end too where there is no table."""
        from qtdog.cli.console import err, warn

        for text in outcome.warnings:
            if text in self._warned:
                self.n_repeated += 1
            else:
                self._warned.add(text)
                warn(f"{task.text}: {text}")

        if self._pace is not None and outcome.status == "done":
            self._pace.add(task, outcome)
        if self._live is None or outcome.status == "failed":
            text = f"{outcome.status:7} {task.text}  {outcome.seconds:.1f} s"
            shown = outcome.reason and outcome.status != "stopped"
            reason = f"  {outcome.reason.splitlines()[0]}" if shown else ""
            err.print(text + reason, highlight=False, markup=False, soft_wrap=True)

    def _running(self, progress: Progress) -> RichTable:
        from rich.table import Table as RichTable

        from qtdog.api.display import duration_text
        from qtdog.sweep.runner import steps_made

        table = RichTable(box=None, pad_edge=False)
        for header in ("running", "step", "for"):
            table.add_column(header)
        now = time.monotonic()
        for task, started in list(progress.running.values())[:N_SHOWN]:
            last = task.step if task.kind == "fork_point" or task.config is None else task.config.train.steps
            step = f"{steps_made(task, self._out)}/{last}" if last else "–"
            table.add_row(task.text, step, duration_text(now - started))
        return table

    def _counts(self, progress: Progress) -> Text:
        from rich.text import Text

        from qtdog.api.display import duration_text

        failed = f", [red]{len(progress.failed)} failed[/]" if progress.failed else ""
        left = (
            self._pace.left_s(progress.waiting, [task for task, _ in progress.running.values()]) if self._pace else None
        )
        time_left = f", about {duration_text(left)} left" if left is not None else ""
        counts = f"{len(progress.done)} of {len(progress.tasks)} done, {len(progress.running)} running"
        return Text.from_markup(f"{counts}{failed}{time_left}")


@contextlib.contextmanager
def progress_display(out: Path) -> Iterator[ProgressDisplay]:
    """Yield the progress display of a sweep in the folder `out`."""
    from rich.live import Live

    from qtdog.cli.console import err

    with contextlib.ExitStack() as stack:
        live = None
        if err.is_terminal:
            live = stack.enter_context(Live(console=err, auto_refresh=False, refresh_per_second=4))
        display = ProgressDisplay(out, live)
        stack.callback(_say_repeated, display)  # also when the sweep is stopped half-way
        yield display
        if live is not None:
            live.refresh()


def _say_repeated(display: ProgressDisplay) -> None:
    from qtdog.cli.console import warn

    if display.n_repeated:
        warn(f"{display.n_repeated} more warnings say the same of other runs: qtdog sweep status STUDY lists them")


def failure_lines(tasks: Sequence[Task], failed: Mapping[str, Outcome], blocked: Sequence[Task]) -> list[str]:
    """Return one line for each failure, and how many tasks wait for one."""
    known = {task.name: task for task in tasks}
    lines = [f"  {known[name].text}: {outcome.reason}" for name, outcome in failed.items() if name in known]
    return lines + ([f"  {len(blocked)} more need one of these"] if blocked else [])


def warning_lines(tasks: Sequence[Task], warnings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one line for each warning of a finished task; what several tasks say alike stands once, with their names.

    Args:
        tasks: of the plan, in its order.
        warnings: name of a task → what it warned of.
    """
    said: dict[str, list[str]] = {}
    for task in tasks:
        for text in warnings.get(task.name, ()):
            said.setdefault(text, []).append(task.text)
    return [f"  {_some(names)}: warned: {text}" for text, names in said.items()]


def _some(names: Sequence[str], n: int = 3) -> str:
    return "; ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


PLOT = "Draw the differences and their intervals to this file too (.png, .pdf, .svg)."
REFERENCE = "Method that the others are compared with, over the pairs of target, trial and seed that both have."
FORMAT = "How the tables are written. Default: by the ending of -o, else text."
SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}
ALSO = "Count runs of an earlier table (--format json) that the folder lacks; may be given several times."


class TableFormat(StrEnum):
    """How the tables are written."""

    TEXT = "text"
    MARKDOWN = "markdown"
    LATEX = "latex"
    CSV = "csv"
    JSON = "json"


def table(
    study: StudyFile,
    *,
    out: RunsFolder = None,
    data: DataFolder = None,
    reference: Annotated[str | None, typer.Option(help=f"{REFERENCE} Default: the study's first.")] = None,
    format_: Annotated[TableFormat | None, typer.Option("--format", help=FORMAT)] = None,
    to_file: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of printing.")] = None,
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
    from qtdog.cli.console import print_text, terminal_width
    from qtdog.cli.sweep import open_plan
    from qtdog.core.errors import RunError
    from qtdog.core.files import write_atomic
    from qtdog.report.render import render
    from qtdog.sweep.results import MEASURES, results, values

    plan, folder = open_plan(study, data, out)
    finished = results(plan, folder, _earlier(also or [], plan))
    if not finished:
        raise RunError(f"no run of the study is finished in {folder}: qtdog sweep {study}")
    name = reference or next(iter(plan.study.methods))
    tables = {measure: values(finished, measure) for measure in MEASURES}
    if plot:
        _plot(tables, name, plot)
    kind = format_.value if format_ else SUFFIXES.get(to_file.suffix if to_file else "", "text")
    if kind == "json":
        numbers = {measure: _numbers(cells, name) for measure, cells in tables.items()} | {"runs": _runs(finished)}
        content = json.dumps(numbers, indent=1) + "\n"
    else:
        shown = [study_table(tables[measure], name, title) for measure, title in MEASURES.items() if tables[measure]]
        content = render(shown, kind, terminal_width() if to_file is None else None)
    if to_file is None:
        print_text(content)
    else:
        write_atomic(to_file, content)


def _earlier(files: Sequence[Path], plan: Plan) -> dict[str, IndexRow]:
    from qtdog.cli.console import warn
    from qtdog.sweep.results import read_earlier

    rows = read_earlier(files)
    foreign = len(rows.keys() - {task.name for task in plan.tasks})
    if foreign:
        warn(
            f"{foreign} of the {len(rows)} runs in {', '.join(map(str, files))} are not of this study and do not count"
        )
    return rows


def _runs(finished: list[Result]) -> list[dict[str, Any]]:
    from qtdog.sweep.results import KEPT

    return [{"method": one.method} | {name: one.row.get(name) for name in KEPT} for one in finished]


def _plot(tables: Mapping[str, Values], reference: str, path: Path) -> None:
    """Draw what is known of the unseen domains.

    Raises:
        ConfigError: no picture can be written there, or no two methods can be compared.
    """
    from qtdog.core.errors import ConfigError
    from qtdog.report.charts import plot_differences
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


def _compared(cells: Values, reference: str) -> dict[str, Comparison]:
    from qtdog.sweep.results import comparisons

    return comparisons(cells, reference) if reference in cells else {}


def _numbers(cells: Values, reference: str) -> dict[str, Any]:
    from qtdog.runs.statistics import average_over_targets, by_target
    from qtdog.sweep.results import targets_of

    def numbers(one: Estimate) -> dict[str, Any]:
        return {"mean": one.mean, "standard_error": one.error, "n": one.n}

    targets = targets_of(cells)
    methods = {
        method: {target: numbers(one) for target, one in by_target(values, targets).items() if one.n}
        for method, values in cells.items()
    }
    compared = {
        method: {"mean": one.mean, "low": one.low, "high": one.high, "p_value": one.p_value, "n": one.n}
        for method, one in _compared(cells, reference).items()
    }
    averages = {method: numbers(average_over_targets(values, targets)) for method, values in cells.items()}
    return {"methods": methods, "averages": averages, "reference": reference, "differences": compared}


def study_table(cells: Values, reference: str, title: str) -> Table:
    """Return the table of one measure: a method each, its mean ± standard error per target, their average, differences.

    Args:
        cells: method → target and replicate → accuracy as a fraction.
        reference: the method that differences are to.
        title: what was measured.
    """
    from qtdog.report.render import Cell, Table
    from qtdog.report.tables import estimate_text, interval_text, points_text
    from qtdog.runs.statistics import average_over_targets, by_target
    from qtdog.sweep.results import targets_of

    targets = targets_of(cells)
    compared = _compared(cells, reference)
    headers = ["method", *targets, "average", "runs", f"− {reference}", "95 % interval"]
    rows = []
    for method, values in cells.items():
        estimates = [*by_target(values, targets).values(), average_over_targets(values, targets)]
        one = compared.get(method)
        difference = ["", ""] if one is None else [f"{points_text(one.mean)} (n={one.n})", interval_text(one)]
        texts = [method, *map(estimate_text, estimates), str(len(values)), *difference]
        rows.append([Cell(text) for text in texts])
    notes = [
        "± is the standard error (population standard deviation / √n); average: mean of the targets' means.",
        f"− {reference}: mean difference over pairs of target, trial and seed, an ensemble with the mean of the runs "
        "with its members' seeds; with the 95 % t interval of paired differences.",
    ]
    return Table(f"accuracy (%), {title}", headers, rows, notes)
