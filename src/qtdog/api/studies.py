"""`qtdog.sweep` and `qtdog.compare`: many runs from Python, and their numbers as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtdog.api.display import CountingBar, as_frame, err
from qtdog.api.python_words import in_python
from qtdog.core.errors import Interrupted, RunError, unknown
from qtdog.runs.aggregate import aggregate
from qtdog.runs.find import find_runs
from qtdog.runs.selection import check_selections
from qtdog.runs.statistics import estimate
from qtdog.sweep.journal import Outcome, save_labels
from qtdog.sweep.local import LocalEngine, local_resources
from qtdog.sweep.plan import Plan, Task, default_out, make_plan, select_tasks
from qtdog.sweep.results import MEASURES, comparisons, results, targets_of, values
from qtdog.sweep.runner import Driver, SweepProgress, check_tasks, unfinished
from qtdog.sweep.study import label_text, read_study

SIGINT_CODE = 130


class StudyResult:
    """The finished runs of a study.

    Args:
        plan: of the study.
        folder: of its runs.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing."""
        return not unfinished(self.plan.tasks, self.folder)

    @in_python
    def rows(self, reference: str | None = None, measure: str = "test_accuracy") -> list[dict[str, Any]]:
        """Return a dictionary for each method: mean and standard error by unseen domain, and the paired difference.

        Args:
            reference: method that the others are compared with; None for the first of the study.
            measure: what is counted, a name of `sweep.results.MEASURES`.

        Raises:
            ConfigError: no such method or measure, with the nearest one.
            RunError: no run is finished.
        """
        if measure not in MEASURES:
            raise RunError(unknown("measure", measure, MEASURES))
        table = values(results(self.plan, self.folder), measure)
        if not table:
            raise RunError(f"no run of the study is finished in {self.folder}")
        name = reference or next(iter(self.plan.study.methods))
        compared = comparisons(table, name)
        rows = []
        for method, cells in table.items():
            row: dict[str, Any] = {"method": method}
            for target in targets_of(table):
                cell = estimate([value for condition, value in cells.items() if condition.target == target])
                row |= {target: cell.mean, f"{target} error": cell.error}
            one = compared.get(method)
            row |= {
                "difference": None if one is None else one.mean,
                "low": None if one is None else one.low,
                "high": None if one is None else one.high,
                "pairs": 0 if one is None else one.n,
            }
            rows.append(row)
        return rows

    def table(self, reference: str | None = None, measure: str = "test_accuracy") -> Any:
        """Return `rows` as a pandas DataFrame, or as they are where pandas is not installed."""
        return as_frame(self.rows(reference, measure))

    def __repr__(self) -> str:
        n_left = len(unfinished(self.plan.tasks, self.folder))
        n_tasks = len(self.plan.tasks)
        return f"StudyResult({self.plan.study.name}: {n_tasks - n_left} of {n_tasks} done in {self.folder})"

    def _repr_html_(self) -> str | None:
        return as_frame(self.rows(), html=True)


class _Lines:
    """Prints a line for each task that ends, or nothing."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown

    def show(self, progress: SweepProgress) -> None:
        """Nothing between the ends of tasks."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Print one task's end."""
        if self._shown:
            name = label_text(task.labels[0]) if task.labels else task.name
            err.print(f"{outcome.status:7} {name}  {outcome.seconds:.1f} s", highlight=False, markup=False)


@in_python
def sweep(
    study: str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    only: str = "",
    workers: int | None = None,
    threads: int | None = None,
    gpus: float | None = None,
    plugins: Sequence[str | Path] = (),
    progress: bool = True,
) -> StudyResult:
    """Make all runs of a study that are missing, on this machine, and return what it says.

    Args:
        study: the study file.
        data: where the images are, if not where the study says.
        out: folder of the run folders. Default: `runs/NAME` of the study.
        only: only runs whose labels contain these words, like "lsq target=sketch", and what they need.
        workers: runs at a time. Default: one for each GPU or core.
        threads: of each run.
        gpus: of each run; a fraction shares one.
        plugins: Python files that register members (`qtdog.register`), beside those that the study names; they are run
            here and in every worker. A member that is registered in a notebook alone is refused: no worker has it.
        progress: print a line for each run that ends.

    Raises:
        ConfigError, DataError: a mistake in the study; nothing was started.
        RunError: some runs failed; the others are finished, and the same call tries these again.
        KeyboardInterrupt: Ctrl-C; what ran has written a checkpoint, and the same call goes on.

    Example:
        >>> import qtdog
        >>> study = qtdog.sweep("study.yaml", progress=False)
        >>> study.is_done, list(study.table(reference="float")["method"])
        (True, ['float', 'lsq'])
    """
    found = read_study(Path(study))
    found = found.model_copy(update={"plugins": [*found.plugins, *map(str, plugins)]})
    plan = make_plan(found, None if data is None else str(data), CountingBar("reading images") if progress else None)
    folder = default_out(found) if out is None else Path(out)
    tasks = select_tasks(plan.tasks, only) if only else plan.tasks
    check_tasks(unfinished(tasks, folder), plan.dataset, CountingBar("decoding images") if progress else None)
    save_labels(plan.study.name, plan.labels, folder)
    engine = LocalEngine(folder, plan.source, local_resources(workers=workers, threads=threads, gpus=gpus))
    try:
        ended = Driver(tasks, folder, engine, _Lines(progress)).run()
    except Interrupted as error:
        if error.exit_code != SIGINT_CODE:
            raise
        raise KeyboardInterrupt(str(error)) from error
    if ended.failed:
        reasons = [f"{name}: {outcome.reason.splitlines()[0]}" for name, outcome in ended.failed.items()]
        raise RunError("\n".join([f"{len(reasons)} runs failed; the same call tries them again:", *reasons]))
    return StudyResult(plan, folder)


@in_python
def compare(runs: Sequence[str | Path] | str | Path, *, selection: str = "source", split: str = "whole") -> Any:
    """Return the table of finished runs and ensembles below some folders: mean and standard error of each method.

    Args:
        runs: run folders, folders of them, or DomainBed's `results.jsonl`.
        selection: how checkpoints are chosen, a name of `runs.selection.SELECTIONS`.
        split: "whole" unseen domain, or the "80" % of it that DomainBed reports.

    Returns:
        a pandas DataFrame, a row per method and data set, or dictionaries where pandas is not installed; accuracies as
        fractions.

    Raises:
        ConfigError: no such selection, with the nearest one.
        RunError: a path does not exist, or nothing is finished.

    Example:
        >>> import qtdog
        >>> list(qtdog.compare(["runs/float", "runs/lsq"])["method"])
        ['erm + float', 'erm + lsq 7 bit']
    """
    paths = [runs] if isinstance(runs, (str, Path)) else runs
    found = find_runs([Path(path) for path in paths])
    (name,) = check_selections([selection])
    rows = []
    for dataset in found.datasets:
        table = aggregate(found.of(dataset), name, split=split)
        for row in table.rows:
            cells = {}
            for column, cell in row.cells.items():
                cells |= {column: cell.mean, f"{column} error": cell.error}
            rows.append({"dataset": dataset, "method": row.method, **cells, "trials": row.n_trials})
    return as_frame(rows)
