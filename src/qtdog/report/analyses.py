"""Finished analyses (`analysis.json` with its figures) beside the runs of a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import RunError

FILE = "analysis.json"
DEPTH = 3
MAX_FILE_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Analysis:
    """One finished analysis.

    Attributes:
        path: its folder.
        kind: the command that made it.
        title: one line.
        runs: labels of the runs that it looked at.
        numbers: rows of its table, all with the same columns.
        notes: sentences that a reader of the numbers must know.
        figures: PNG files.
        files: everything beside the JSON that a reader may want, by name.
    """

    path: Path
    kind: str
    title: str
    runs: list[str]
    numbers: list[Mapping[str, Any]]
    notes: list[str]
    figures: list[Path]
    files: list[Path]


def find_analyses(paths: Sequence[Path]) -> list[Analysis]:
    """Return the analyses in or below the paths, to a depth of three folders, each once.

    Raises:
        RunError: an `analysis.json` that is not what an analysis writes.
    """
    files = {file.resolve(): file for path in paths for file in _files(path, DEPTH)}
    return [_read(file) for file in files.values()]


def _files(path: Path, depth: int) -> Iterator[Path]:
    if not path.is_dir():
        return
    if (path / FILE).is_file():
        yield path / FILE
    below = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    for child in below if depth else ():
        yield from _files(child, depth - 1)


def _read(file: Path) -> Analysis:
    if file.stat().st_size > MAX_FILE_BYTES:
        raise RunError(f"{file} has {file.stat().st_size:,} bytes: no analysis writes that much. Leave it out")
    try:
        told = json.loads(file.read_text())
        beside = [_beside(file.parent, str(name)) for name in [*told["figures"], *told["data"]]]
        there = [path for path in beside if path.is_file()]
        return Analysis(
            path=file.parent,
            kind=str(told["kind"]),
            title=str(told["title"]),
            runs=[str(run["label"]) for run in told["runs"]],
            numbers=[dict(row) for row in told["numbers"]],
            notes=[str(note) for note in told["notes"]],
            figures=[path for path in there if path.suffix == ".png"],
            files=there,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file} is not what an analysis writes ({error!r}). Leave it out") from error


def _beside(folder: Path, name: str) -> Path:
    """Return the path of a file of an analysis; one outside its folder would put any picture into the page."""
    if Path(name).name != name:
        raise ValueError(f"the file name {name!r} has a folder in it")
    return folder / name
