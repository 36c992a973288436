"""From a table of the paper to the runs that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import Tree, build_config, load_preset
from qtdog.core.errors import DataError
from qtdog.core.paper import PaperRow, PaperTable
from qtdog.data.cards import CARDS
from qtdog.data.dataset import DomainDataset
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
