"""`qtdog reproduce`: the tables of the paper, our runs beside its numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import Tree, build_config, load_preset
from qtdog.core.errors import DataError
from qtdog.core.paper import MEASURES, PaperRow, PaperTable
from qtdog.data.cards import CARDS
from qtdog.data.dataset import DomainDataset
from qtdog.models.flops import training_flops
from qtdog.models.text import TEXT_BACKBONES
from qtdog.runs.folder import RunFolder
from qtdog.training.protocol import resolve


@dataclass(frozen=True)
class Job:
    """One run of a row.

    Attributes:
        row: the row of the paper's table.
        config: effective; without the content of the data if that is not here.
        folder: where it is, or will be.
        n_sources: domains that it trains on.
        result: of the finished run, else None.
    """

    row: PaperRow
    config: Config
    folder: RunFolder
    n_sources: int
    result: dict[str, Any] | None


@dataclass(frozen=True)
class Question:
    """What the user wants to reproduce.

    Attributes:
        table: which one.
        rows: the rows of it.
        trials: runs with different splits and seeds per row and target; an ensemble has one of each member's.
        out: folder of run folders.
        changes: configuration on top of everything, such as where the data lies.
    """

    table: PaperTable
    rows: Sequence[PaperRow]
    trials: int
    out: Path
    changes: Sequence[Tree] = ()

    def config(self, row: PaperRow) -> Config:
        """Return the configuration of a row, its target still as the preset has it (ConfigError if it is none)."""
        return build_config([load_preset(self.table.preset), row.change, *self.changes])


def plan_jobs(question: Question, dataset: DomainDataset | None) -> list[Job]:
    """Return the runs of all rows that can be run, in the order of the table; trial after trial.

    Args:
        question: what is wanted.
        dataset: the data; None if it is not here, and the runs are only to be counted.

    Raises:
        ConfigError, DataError: as in `training.protocol.resolve`.
        RunError: a result cannot be read.
    """
    jobs = []
    for row in question.rows:
        if row.missing:
            continue
        config = question.config(row)
        n_runs = question.trials if row.members == 1 else row.members
        targets = _targets(config, row, dataset)
        for trial, target in product(range(n_runs), targets):
            jobs.append(_job(question, row, _of(config, trial, target), dataset))
    return jobs


def _targets(config: Config, row: PaperRow, dataset: DomainDataset | None) -> Sequence[str]:
    if config.data.target != "all":
        return (config.data.target,)
    named = [name.partition("/")[2] for name in row.values]
    if all(named):
        return named
    if dataset is not None:
        return dataset.domains
    domains = CARDS[config.data.source].domains
    if domains is None:
        raise DataError(f"{config.data.source} is not here, and its card names no domains")
    return domains


def _of(config: Config, trial: int, target: str) -> Config:
    return build_config([config.model_dump(), {"data": {"trial": trial, "target": target}, "train": {"seed": trial}}])


def _job(question: Question, row: PaperRow, config: Config, dataset: DomainDataset | None) -> Job:
    effective = config if dataset is None else resolve(config, dataset)
    folder = RunFolder(question.out / config_hash(effective))
    result = folder.read_result() if dataset is not None and folder.model_file.is_file() else None
    return Job(row, effective, folder, _n_sources(config, dataset), result)


def _n_sources(config: Config, dataset: DomainDataset | None) -> int:
    if dataset is not None:
        return sum(domain != config.data.target and dataset.trains_on(domain) for domain in dataset.domains)
    # of texts the seen side is the one source
    return len(set(CARDS[config.data.source].domains or ("seen",)) - {config.data.target})


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


def cost_of(jobs: Iterable[Job]) -> Cost:
    """Return what the runs cost that are not finished; a run that several rows share counts once.

    Raises:
        ModelError: as in `models.flops.training_flops`.
    """
    missing = {job.folder.path: job for job in jobs if job.result is None}
    each: dict[tuple[str, int, int], float] = {}
    n_images, flops = 0, 0.0
    for job in missing.values():
        what = _network_of(job.config)
        if what not in each:
            each[what] = training_flops(what[0], channels=what[1], size=what[2])
        seen = job.config.train.steps * job.config.data.batch_size * job.n_sources
        n_images += seen
        flops += seen * each[what]
    return Cost(len(missing), n_images, flops)


def _network_of(config: Config) -> tuple[str, int, int]:
    sheet = CARDS[config.data.source] if config.data.source in list(CARDS) else None
    is_text = config.model.backbone in TEXT_BACKBONES
    size = config.data.max_tokens if is_text else config.data.image_size
    return config.model.backbone, 3 if sheet is None else sheet.channels, size


NOT_OURS = ("mean_of_five",)  # measures that no single data set can give
HEADERS = ["method", "measured on", "paper", "ours", "difference", "from"]


@dataclass(frozen=True)
class Line:
    """One number of the paper, and ours.

    Attributes:
        method: as the paper calls it.
        measure: a name in `core.paper.MEASURES`, perhaps with "/" and a domain.
        paper: accuracy there, %.
        ours: mean over the trials that are complete, %; None if there is none yet.
        error: standard error of that mean; None below two trials.
        told: how many runs there are, or why there is none.
        note: what else differs.
    """

    method: str
    measure: str
    paper: float
    ours: float | None
    error: float | None
    told: str
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, in points; None where they are not the same kind of number."""
        return None if self.ours is None or self.measure in NOT_OURS else self.ours - self.paper

    def cells(self) -> list[str]:
        """Return the line as cells of a table with `HEADERS`."""
        name, _, domain = self.measure.partition("/")
        ours = "–" if self.ours is None else f"{self.ours:.1f}" + (f" ± {self.error:.1f}" if self.error else "")
        difference = "–" if self.difference is None else f"{self.difference:+.1f}"
        return [self.method, domain or MEASURES[name], f"{self.paper:.1f}", ours, difference, self.told]


def lines_of(row: PaperRow, trials: Sequence[Mapping[str, dict[str, Any]]], n_targets: int) -> list[Line]:
    """Return the lines of a row.

    Args:
        row: of the paper.
        trials: for each trial the results by target, as far as there are any; an ensemble is one trial.
        n_targets: how many targets a complete trial has.
    """
    lines = []
    for measure, paper in row.values.items():
        name, _, domain = measure.partition("/")
        needed = 1 if domain else n_targets
        found = [[result for target, result in trial.items() if domain in ("", target)] for trial in trials]
        whole = [statistics.fmean(value_of(one, name) for one in trial) for trial in found if len(trial) == needed]
        ours = 100 * statistics.fmean(whole) if whole else None
        error = 100 * statistics.stdev(whole) / math.sqrt(len(whole)) if len(whole) > 1 else None
        lines.append(Line(row.method, measure, paper, ours, error, row.missing or _told(row, found, needed), row.note))
    return lines


def _told(row: PaperRow, found: Sequence[Sequence[Any]], needed: int) -> str:
    n_runs, n_wanted = sum(map(len, found)), needed * max(len(found), 1)
    what = "runs" if row.members == 1 else f"ensembles of {row.members}"
    return f"{n_runs} of {n_wanted} {what}"


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


STUDY = "Which table, like table01; leave it out to list them."
DATASET = "Which data set of the table, as the paper or 'qtdog data list' calls it."
DATA = "Where the data set lies. Default: as for 'qtdog train --data NAME'."
ONLY = "Only this method of the table; may be given several times."
TRIALS = "Splits and seeds per method and unseen domain. An ensemble has one of each member's instead."
DRY_RUN = "Show what is there and what the missing runs would cost; run nothing."
SPEED = "For the estimate: 10¹² operations per second that your device sustains in training."
OUT = "Folder of the run folders; what is there already is not run again."
SET = "Change the setting, for example to try it out; it is then not the paper's."


def reproduce(
    study: Annotated[str | None, typer.Argument(help=STUDY, metavar="[TABLE]")] = None,
    *,
    dataset: Annotated[str | None, typer.Option(help=DATASET)] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="METHOD", help=ONLY)] = None,
    trials: Annotated[int, typer.Option(min=1, max=100, help=TRIALS)] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False,
    speed: Annotated[float, typer.Option(min=0.001, metavar="TFLOPS", help=SPEED)] = 10.0,
    assign: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help=SET)] = None,
    out: Annotated[Path, typer.Option(help=OUT)] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a table of the QT-DoG paper, as far as it is missing, and print our numbers beside the paper's.

    Stopped with Ctrl-C, it goes on where it was when it is called again.

    Examples:
      qtdog reproduce                                               (the tables that there are)

      qtdog reproduce table01 --dataset PACS --dry-run              (what would be run, and what that costs)

      qtdog reproduce table01 --dataset PACS --only ERM --only QT-DoG --trials 1
    """
    from qtdog.core.config_io import parse_assignment
    from qtdog.core.paper import choose_rows, find_table

    if study is None:
        show_tables(as_json=as_json)
        return
    table = find_table(study, dataset)
    changes = [parse_assignment(text) for text in assign or ()]
    if data is not None:
        changes.append({"data": {"source": data}})
    question = Question(table, list(choose_rows(table, only or [])), trials, out, changes)
    found = open_data(question, may_be_missing=dry_run)
    if not dry_run:
        run_missing(question, found)
    lines, jobs = measure(question, found, make=not dry_run)
    if as_json:
        _print_json(question, lines, jobs, speed)
        return
    _show(question, lines, changed=bool(assign))
    if dry_run:
        show_cost(jobs, speed, found)


def show_tables(*, as_json: bool) -> None:
    """Print the tables that can be reproduced."""
    from qtdog.cli.console import print_json, print_table
    from qtdog.core.paper import paper_tables

    tables = paper_tables()
    if as_json:
        print_json([table.model_dump() for table in tables])
        return
    studies = {table.study: table for table in tables}
    rows = []
    for study, one in studies.items():
        datasets = [table.dataset for table in tables if table.study == study]
        rows.append([study, ", ".join(datasets), one.title])
    print_table(["table", "data sets", "what"], rows)


def open_data(question: Question, *, may_be_missing: bool) -> DomainDataset | None:
    """Return the data set of a table, and warn if it is another; None if it is not here and that does not matter.

    Raises:
        DataError: it is not here, or is malformed.
    """
    from qtdog.cli.console import CountingBar, warn
    from qtdog.core.config_io import load_preset
    from qtdog.core.errors import DataError
    from qtdog.data.open import open_readable

    asked, meant = question.config(question.rows[0]).data, load_preset(question.table.preset)["data"]["source"]
    source = asked.source
    try:
        found = open_readable(source, skip_unreadable=asked.skip_unreadable, progress=CountingBar("reading images"))
    except DataError:
        if may_be_missing and source == meant:
            return None
        raise
    if found.sheet.name != meant:
        warn(f"{source} is not {meant}: ours is not a reproduction of these numbers")
    return found


def run_missing(question: Question, dataset: DomainDataset | None) -> None:
    """Make the runs that are missing, one after another.

    Raises:
        Interrupted: a signal asked to stop; everything so far is kept.
    """
    from qtdog.api.experiment import Planned
    from qtdog.cli.console import err
    from qtdog.cli.train import run_all

    missing = {job.folder.path: job for job in plan_jobs(question, dataset) if job.result is None}
    for place, job in enumerate(missing.values(), start=1):
        config = job.config
        text = f"{place} of {len(missing)}: {job.row.method}, unseen {config.data.target}, trial {config.data.trial}"
        err.print(text, highlight=False, markup=False)
        run_all(dataset, [Planned(config, job.folder)], resume=True)


def measure(question: Question, dataset: DomainDataset | None, *, make: bool) -> tuple[list[Line], list[Job]]:
    """Return the lines of the table and the runs that it stands on; with `make` ensembles are put together now."""
    jobs = plan_jobs(question, dataset)
    lines: list[Line] = []
    for row in question.rows:
        own = [job for job in jobs if job.row is row]
        targets = list(dict.fromkeys(job.config.data.target for job in own))
        single = row.members == 1
        trials = _single_trials(own) if single else [_ensembles(question, own, dataset, targets) if make else {}]
        lines += lines_of(row, trials, len(targets))
    return lines, jobs


def _single_trials(jobs: Sequence[Job]) -> list[dict[str, dict[str, Any]]]:
    trials: dict[int, dict[str, dict[str, Any]]] = {job.config.data.trial: {} for job in jobs}
    for job in jobs:
        if job.result is not None:
            trials[job.config.data.trial][job.config.data.target] = job.result
    return list(trials.values())


def _ensembles(
    question: Question, jobs: Sequence[Job], dataset: DomainDataset | None, targets: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the result of the ensemble of each target whose members are all there."""
    from qtdog.api.experiment import join_crew
    from qtdog.cli.console import warn

    made = {}
    method = jobs[0].row.method.lower().replace(" ", "-")
    out = question.out / "ensembles" / f"{question.table.preset.rpartition('/')[2]}-{method}"
    for target in targets:
        members = [job for job in jobs if job.config.data.target == target]
        if dataset is not None and all(job.result is not None for job in members):
            made[target] = join_crew(dataset, [job.folder.path for job in members], out, warn=warn)
    return made


def _show(question: Question, lines: Sequence[Line], *, changed: bool) -> None:
    from qtdog.cli.console import out, print_table, warn

    table = question.table
    print_table(HEADERS, [line.cells() for line in lines], title=f"{table.dataset}: {table.title} (%)")
    out.print("ours: mean ± standard error over trials; single models on 80 % of the unseen domain, ensembles on all")
    for method, note in {line.method: line.note for line in lines if line.note}.items():
        out.print(f"{method}: {note}", soft_wrap=True, highlight=False)
    if changed:
        warn("--set changed the setting: ours is not a reproduction of these numbers")


def show_cost(jobs: Sequence[Job], speed: float, dataset: DomainDataset | None) -> None:
    """Print the runs and what the missing ones would cost."""
    from qtdog.cli.console import out, print_table

    rows: dict[Path, list[str]] = {}
    for job in jobs:
        data, state = job.config.data, "missing" if job.result is None else "done"
        folder = str(job.folder.path) if dataset is not None else "–"
        row = rows.setdefault(job.folder.path, [job.row.method, data.target, str(data.trial), state, folder])
        if job.row.method not in row[0].split(", "):
            row[0] += f", {job.row.method}"
    print_table(["method", "unseen", "trial", "", "folder"], list(rows.values()))
    cost = cost_of(jobs)
    text = f"{cost.n_runs} of {len(rows)} runs are missing: {cost.n_images:,} images, {cost.flops / 1e15:,.0f} PFLOP"
    out.print(f"{text}, about {cost.hours(speed):,.1f} h at {speed:g} TFLOP/s (--speed)", highlight=False)
    if dataset is None:
        out.print("The data is not here: which runs are finished, and the names of their folders, is not known.")


def _print_json(question: Question, lines: Sequence[Line], jobs: Sequence[Job], speed: float) -> None:
    from qtdog.cli.console import print_json

    cost = cost_of(jobs)
    runs = [
        {"method": job.row.method, "target": job.config.data.target, "trial": job.config.data.trial}
        | {"folder": str(job.folder.path), "done": job.result is not None}
        for job in jobs
    ]
    told = {"table": question.table.study, "dataset": question.table.dataset}
    found = [asdict(line) | {"difference": line.difference} for line in lines]
    print_json(told | {"lines": found, "runs": runs, "missing": asdict(cost) | {"hours": cost.hours(speed)}})
