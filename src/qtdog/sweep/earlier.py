"""Results of runs whose folders are elsewhere or gone: the rows that `qtdog sweep table --format json` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtdog.core.errors import ConfigError
from qtdog.sweep.index_row import COLUMNS, Row

# What a table's JSON says of each run, beside the method.
KEPT = (
    "folder",
    "target",
    "seed",
    "trial",
    "selected_step",
    "size_bytes",
    "trained_s",
    "bits",
    "start_step",
    "source_accuracy",
    "test_accuracy",
    "mean_after_start",
    "std_after_start",
)
TYPES = {"TEXT": str, "TEXT PRIMARY KEY": str, "INTEGER": int, "REAL": (int, float)}


def read_earlier(files: Sequence[Path]) -> dict[str, Row]:
    """Return what earlier tables say of runs, by the name of the run's folder: its configuration's hash.

    Since the name is the hash, a row counts for no other configuration than the one that was measured. Of a run that is
    in several files the first one counts.

    Args:
        files: written by `qtdog sweep table --format json`.

    Raises:
        ConfigError: a file that is not there or no such table.
    """
    rows: dict[str, Row] = {}
    for file in files:
        for row in _read(file):
            rows.setdefault(Path(str(row["folder"])).name, row)
    return rows


def _read(file: Path) -> list[Row]:
    try:
        return [_checked(row) for row in json.loads(file.read_text())["runs"]]
    except FileNotFoundError as error:
        raise ConfigError(f"--also {file} does not exist") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"--also {file} is no table of a study ({error!r})"
        raise ConfigError(f"{text}; qtdog sweep table STUDY --format json makes one") from error


def _checked(row: Any) -> Row:
    found = {name: row.get(name) for name in KEPT} if isinstance(row, dict) else {}
    wrong = [name for name, value in found.items() if not _fits(name, value)]
    if wrong or not found.get("folder"):
        raise ValueError(f"a run with a wrong {wrong[0] if wrong else 'folder'}")
    return found


def _fits(name: str, value: Any) -> bool:
    return value is None or (isinstance(value, TYPES[COLUMNS[name]]) and not isinstance(value, bool))
