"""The tables of the QT-DoG paper: the values there, the runs that reproduce them, and our numbers beside them."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from qtdog.api.experiment import join_members
from qtdog.core.config import Config, Section, config_hash
from qtdog.core.config_io import Tree, build_config, load_preset, paper_part, preset_names
from qtdog.core.errors import ConfigError, DataError, nearest, unknown
from qtdog.data.cards import CARDS
from qtdog.data.dataset import DomainDataset
from qtdog.models.flops import training_flops
from qtdog.models.text_backbones import TEXT_BACKBONES
from qtdog.runs.folder import RunFolder
from qtdog.runs.statistics import estimate
from qtdog.training.protocol import resolve

FOLDER = "paper/"
MEASURES = {
    "unseen": "unseen domain",
    "unseen_all": "unseen domain, all of it",
    "in_domain": "in domain, last 20 % of each source",
    "source": "held-out part of the sources",
    "percentile_10_in": "10th percentile over known reviewers",
    "percentile_10_out": "10th percentile over unseen reviewers",
    "mean_of_five": "unseen domain, mean of five data sets",
}


class PaperRow(Section):
    """One row of a table.

    Attributes:
        method: as the paper calls it.
        values: measure → accuracy in the paper, %. A measure is a name in `MEASURES`; `unseen/DOMAIN` is that of one
            domain.
        change: configuration of our run where it differs from the preset's.
        members: how many runs make the ensemble that is measured; 1 for the mean of single runs.
        missing: why it cannot be run here; "" if it can.
        note: what else differs from the paper's.
    """

    method: str
    values: dict[str, float] = Field(min_length=1)
    change: dict[str, dict[str, Any]] = Field(default={})
    members: int = Field(default=1, ge=1, le=60)
    missing: str = ""
    note: str = ""

    @field_validator("values")
    @classmethod
    def _known_measures(cls, values: dict[str, float]) -> dict[str, float]:
        for name in values:
            if name.partition("/")[0] not in MEASURES:
                raise ValueError(unknown("measure", name, MEASURES))
        return values


class PaperTable(Section):
    """The part `paper:` of a preset.

    Attributes:
        study: which table; several presets have one study, each with another data set.
        dataset: as the paper calls it.
        title: what the numbers are.
        rows: methods and values.
        preset: the name of the preset.
    """

    study: str
    dataset: str
    title: str
    rows: tuple[PaperRow, ...]
    preset: str = ""


def paper_tables() -> list[PaperTable]:
    """Return the tables of all shipped presets, by name.

    Example:
        >>> sorted({table.study for table in paper_tables()})[:2]
        ['amazon', 'bits']
    """
    return [read_table(name) for name in preset_names() if name.startswith(FOLDER)]


def read_table(preset: str) -> PaperTable:
    """Return what a shipped preset says of the paper.

    Raises:
        ConfigError: it says nothing of it, or something that is not understood.
    """
    try:
        return PaperTable.model_validate(paper_part(preset) | {"preset": preset})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"preset {preset}, paper.{where}: {first['msg']}") from error


def find_table(study: str, dataset: str | None) -> PaperTable:
    """Return the table that a user means.

    Args:
        study: like "table01".
        dataset: as the paper or `qtdog data list` calls it, or a beginning of that; None if there is only one.

    Raises:
        ConfigError: there is no such study or data set (with the nearest match), or several to choose from.

    Example:
        >>> find_table("table01", "terrainc").preset
        'paper/table01-terraincognita'
    """
    tables = paper_tables()
    studies = {table.study for table in tables}
    if study not in studies:
        raise ConfigError(unknown("table", study, studies))
    fitting = [table for table in tables if table.study == study]
    names = [table.dataset for table in fitting]
    if dataset is not None:
        fitting = [table for table in fitting if _plain(table.dataset).startswith(_plain(dataset))]
        if not fitting:
            raise ConfigError(unknown(f"data set of {study}", dataset, names))
    if len(fitting) > 1:
        raise ConfigError(f"{study} has several data sets: add --dataset, one of {', '.join(names)}")
    return fitting[0]


def choose_rows(table: PaperTable, only: list[str]) -> Iterator[PaperRow]:
    """Yield the rows of the methods in `only`, or all if it is empty.

    Raises:
        ConfigError: there is no such method, with the nearest match.
    """
    methods = {row.method.lower(): row.method for row in table.rows}
    for name in only:
        if name.lower() not in methods:
            close = nearest(name, methods.values())
            hint = f"; did you mean '{close}'?" if close else "."
            raise ConfigError(f"{table.study} has no method '{name}'{hint} It has {', '.join(methods.values())}")
    wanted = {name.lower() for name in only} or set(methods)
    yield from (row for row in table.rows if row.method.lower() in wanted)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


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
    card = CARDS[config.data.source] if config.data.source in list(CARDS) else None
    is_text = config.model.backbone in TEXT_BACKBONES
    size = config.data.max_tokens if is_text else config.data.image_size
    return config.model.backbone, 3 if card is None else card.channels, size


NOT_OURS = ("mean_of_five",)  # measures that no single data set can give
HEADERS = ["method", "measured on", "paper", "ours", "difference", "from"]


@dataclass(frozen=True)
class Line:
    """One number of the paper, and ours.

    Attributes:
        method: as the paper calls it.
        measure: a name in `api.paper.MEASURES`, perhaps with "/" and a domain.
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
        ours = estimate([100 * value for value in whole])
        lines.append(
            Line(row.method, measure, paper, ours.mean, ours.error, row.missing or _told(row, found, needed), row.note)
        )
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


def measure(
    question: Question,
    dataset: DomainDataset | None,
    *,
    make: bool,
    warn: Callable[[str], None] = warnings.warn,
) -> tuple[list[Line], list[Job]]:
    """Return the lines of the table and the runs that it stands on; with `make` ensembles are put together now."""
    jobs = plan_jobs(question, dataset)
    lines: list[Line] = []
    for row in question.rows:
        own = [job for job in jobs if job.row is row]
        targets = list(dict.fromkeys(job.config.data.target for job in own))
        single = row.members == 1
        trials = _single_trials(own) if single else [_ensembles(question, own, dataset, targets, warn) if make else {}]
        lines += lines_of(row, trials, len(targets))
    return lines, jobs


def _single_trials(jobs: Sequence[Job]) -> list[dict[str, dict[str, Any]]]:
    trials: dict[int, dict[str, dict[str, Any]]] = {job.config.data.trial: {} for job in jobs}
    for job in jobs:
        if job.result is not None:
            trials[job.config.data.trial][job.config.data.target] = job.result
    return list(trials.values())


def _ensembles(
    question: Question,
    jobs: Sequence[Job],
    dataset: DomainDataset | None,
    targets: Sequence[str],
    warn: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Return the result of the ensemble of each target whose members are all there."""
    made = {}
    method = jobs[0].row.method.lower().replace(" ", "-")
    out = question.out / "ensembles" / f"{question.table.preset.rpartition('/')[2]}-{method}"
    for target in targets:
        members = [job for job in jobs if job.config.data.target == target]
        if dataset is not None and all(job.result is not None for job in members):
            made[target] = join_members(dataset, [job.folder.path for job in members], out, warn=warn)
    return made
