"""What a preset says of the paper: which table it belongs to, the values there, and what changes from row to row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, ValidationError, field_validator

from qtdog.core.config import Section
from qtdog.core.config_io import paper_part, preset_names
from qtdog.core.errors import ConfigError, nearest, unknown

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
