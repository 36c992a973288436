"""`qtdog.sweep` and `qtdog.compare`: many runs from Python, their numbers as tables; the paper's tables as studies."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qtdog.api.budget import training_flops
from qtdog.api.display import CountingBar, as_frame, err
from qtdog.api.python_words import in_python, python_words
from qtdog.core.config import Config
from qtdog.core.config_io import Tree
from qtdog.core.errors import ConfigError, DataError, Interrupted, RunError, unknown
from qtdog.data.cards import CARDS
from qtdog.models.text_backbones import TEXT_BACKBONES
from qtdog.runs.aggregate import aggregate
from qtdog.runs.find import find_runs
from qtdog.runs.selection import check_selections
from qtdog.runs.statistics import estimate
from qtdog.sweep.journal import Outcome, read_warnings, save_labels
from qtdog.sweep.local import LocalEngine, local_resources
from qtdog.sweep.plan import Plan, Task, default_out, make_plan, select_tasks
from qtdog.sweep.results import MEASURES, ExpectedRow, comparisons, results, targets_of, tasks_of_row, values
from qtdog.sweep.runner import Driver, SweepProgress, check_tasks, is_done, unfinished
from qtdog.sweep.study import Study, expand_without_data, read_study

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

    @property
    def warnings(self) -> dict[str, list[str]]:
        """What finished runs warned of, by the run: method and axes."""
        said = read_warnings(self.folder)
        return {task.text: list(map(python_words, said[task.name])) for task in self.plan.tasks if task.name in said}

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
    """Prints a line for each task that ends, or nothing; what a task warned of becomes a Python warning."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown

    def show(self, progress: SweepProgress) -> None:
        """Nothing between the ends of tasks."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Print one task's end."""
        for text in outcome.warnings:
            warnings.warn(python_words(f"{task.text}: {text}"), stacklevel=2)
        if self._shown:
            err.print(f"{outcome.status:7} {task.text}  {outcome.seconds:.1f} s", highlight=False, markup=False)


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


STUDIES = Path(__file__).parents[1] / "studies"
TRIALS = "trial, seed"  # the axis of repetitions: each has its split and its seed


@cache
def shipped_studies() -> dict[str, Study]:
    """Return the studies of the paper's tables, by name.

    Example:
        >>> list(shipped_studies())[:2]
        ['amazon', 'bits']
    """
    return {path.stem: read_study(path) for path in sorted(STUDIES.glob("*.yaml"))}


def find_study(name: str, dataset: str | None = None) -> tuple[Study, str]:
    """Return the study that a user means, on one data set, and what it calls that.

    Args:
        name: like "table01", or a study file with expected values.
        dataset: as the study or `qtdog data list` calls it, or a beginning of that; None if there is only one.

    Raises:
        ConfigError: there is no such study or data set (with the nearest match), several to choose from, or nothing is
            expected of it.

    Example:
        >>> study, dataset = find_study("table01", "terrainc")
        >>> study.name, dataset
        ('table01-TerraIncognita', 'TerraIncognita')
    """
    path = Path(name)
    shipped = shipped_studies()
    if path.suffix in (".yaml", ".yml"):
        study = read_study(path)
    elif name in shipped:
        study = shipped[name]
    else:
        raise ConfigError(unknown("table", name, shipped))
    chosen = study.data or ""
    if study.datasets:
        names = list(study.datasets)
        fitting = names if dataset is None else [one for one in names if _plain(one).startswith(_plain(dataset))]
        if not fitting:
            raise ConfigError(unknown(f"data set of {name}", str(dataset), names))
        if len(fitting) > 1:
            raise ConfigError(f"{name} has several data sets: add --dataset, one of {', '.join(fitting)}")
        chosen = fitting[0]
        study = study.on_dataset(chosen)
    if not study.expected:
        raise ConfigError(
            f"study {name} says nothing of what is expected: give each method its values below 'expected:'"
        )
    return study, chosen


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def narrow(study: Study, rows: Sequence[ExpectedRow], n_trials: int, changes: Sequence[Tree] = ()) -> Study:
    """Return the study with the runs of some rows alone.

    Args:
        study: on one data set. If it has no axis `TRIALS`, its repetitions stay.
        rows: what is wanted; the members of an ensemble come with it.
        n_trials: trials of each method and target; an ensemble has one for each member.
        changes: configuration on top of everything.
    """
    names = {row.name for row in rows}
    ensembles = [one for one in study.ensembles if one.name in names]
    needed = {one.method: max(seed for group in one.members for seed in group) + 1 for one in ensembles}
    own = {
        f"{section}.{key}": value
        for tree in changes
        for section, values in tree.items()
        for key, value in values.items()
    }
    repeats = TRIALS in study.grid
    grid = study.grid | ({TRIALS: list(range(n_trials))} if repeats else {})
    target = own.pop("data.target", None)
    if target not in (None, "all"):
        grid = grid | {"target": [target]}
    methods = {}
    for name, method in study.methods.items():
        if name in names or name in needed:
            axes = {TRIALS: list(range(max(n_trials, needed.get(name, 0))))} if repeats else {}
            methods[name] = method.model_copy(update={"set": method.set | own, "grid": method.grid | axes})
    return study.model_copy(update={"methods": methods, "ensembles": ensembles, "grid": grid})


@dataclass(frozen=True)
class PlannedRun:
    """One run of a row; a run that several rows have is there for each.

    Attributes:
        method: the row's title.
        config: effective; without the content of the data if that is not here.
        folder: where it is, or will be; None if the data is not here.
        n_sources: domains that it trains on.
        is_done: whether it is finished.
    """

    method: str
    config: Config
    folder: Path | None
    n_sources: int
    is_done: bool = False


def planned_runs(plan: Plan, out: Path, rows: Iterable[ExpectedRow], n_trials: int) -> list[PlannedRun]:
    """Return the runs of all rows that are run, in the order of the table."""
    runs = []
    for row in rows:
        names = dict.fromkeys(
            name
            for task in tasks_of_row(plan, row, n_trials)
            for name in (task.needs if task.ensemble else (task.name,))
        )
        for task in map(plan.__getitem__, names):
            config = task.config
            assert config is not None
            sources = plan.dataset.sources(config.data.target)
            runs.append(PlannedRun(row.title, config, task.folder(out), len(sources), is_done(task, out)))
    return runs


def count_runs(study: Study, rows: Iterable[ExpectedRow], n_trials: int) -> list[PlannedRun]:
    """Return the runs of all rows of a study whose data is not here.

    Raises:
        DataError: the data's card does not name its domains, and they decide how many runs there are.
    """
    card = CARDS[study.data or ""]
    if card.domains is None and "target" in study.grid and study.grid["target"] == ["all"]:
        raise DataError(f"{card.name} is not here, and its card names no domains")
    made_of = {one.name: one.method for one in study.ensembles}
    every = expand_without_data(study, card.domains or ())
    runs = []
    for row in rows:
        n_wanted = n_trials if row.members == 1 else row.members
        for labels, config in every:
            if labels["method"] == made_of.get(row.name, row.name) and config.data.trial < n_wanted:
                # of texts the seen side is the one source
                n_sources = len(set(card.domains or ("seen",)) - {config.data.target})
                runs.append(PlannedRun(row.title, config, None, n_sources))
    return runs


@dataclass(frozen=True)
class Cost:
    """What runs cost to train; evaluations, and objectives that pass more than once over a batch, come on top.

    Attributes:
        n_runs: runs.
        n_images: images (or texts) that are trained on, with repetition.
        flops: floating-point operations.
    """

    n_runs: int
    n_images: int
    flops: float

    def hours(self, tflops: float) -> float:
        """Return the hours on a device that sustains `tflops` · 10¹² operations per second.

        Example:
            >>> Cost(1, 1, 3.6e16).hours(10)
            1.0
        """
        return self.flops / (tflops * 1e12) / 3600


def cost_of(runs: Iterable[PlannedRun]) -> Cost:
    """Return what the runs cost that are not finished; a run that several rows share counts once.

    Raises:
        ModelError: as in `api.budget.training_flops`.
    """
    missing = {run.config.model_dump_json(): run for run in runs if not run.is_done}
    by_network: dict[tuple[str, int, int], float] = {}
    n_images, flops = 0, 0.0
    for run in missing.values():
        network = backbone, channels, size = _network_of(run.config)
        if network not in by_network:
            by_network[network] = training_flops(backbone, channels=channels, size=size)
        n_trained = run.config.train.steps * run.config.data.batch_size * run.n_sources
        n_images += n_trained
        flops += n_trained * by_network[network]
    return Cost(len(missing), n_images, flops)


def _network_of(config: Config) -> tuple[str, int, int]:
    card = CARDS[config.data.source] if config.data.source in list(CARDS) else None
    is_text = config.model.backbone in TEXT_BACKBONES
    size = config.data.max_tokens if is_text else config.data.image_size
    return config.model.backbone, 3 if card is None else card.channels, size
