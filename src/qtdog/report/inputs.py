"""What a report shows beside the runs: finished analyses and measured latencies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import RunError
from qtdog.runs.finished import FinishedRun

FILE = "analysis.json"
DEPTH = 3
MAX_ANALYSIS_BYTES = 16 * 1024**2


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
    if file.stat().st_size > MAX_ANALYSIS_BYTES:
        raise RunError(f"{file} has {file.stat().st_size:,} bytes: no analysis writes that much. Leave it out")
    try:
        content = json.loads(file.read_text())
        beside = [_beside(file.parent, str(name)) for name in [*content["figures"], *content["data"]]]
        there = [path for path in beside if path.is_file()]
        return Analysis(
            path=file.parent,
            kind=str(content["kind"]),
            title=str(content["title"]),
            runs=[str(run["label"]) for run in content["runs"]],
            numbers=[dict(row) for row in content["numbers"]],
            notes=[str(note) for note in content["notes"]],
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


MAX_LATENCY_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Timed:
    """One model file in one runtime.

    Attributes:
        path: of the file, or of the run's folder.
        p50_ms: median time of a call, in milliseconds.
        runtime: in which it ran.
    """

    path: Path
    p50_ms: float
    runtime: str


@dataclass(frozen=True)
class BenchFile:
    """A file of `qtdog bench`.

    Attributes:
        timed: its rows.
        setting: what all rows share, for people.
    """

    timed: tuple[Timed, ...]
    setting: str


def read_bench(file: Path) -> BenchFile:
    """Return what the `bench.json` of `qtdog bench --output` says; paths in it are as from the folder one is in.

    Raises:
        RunError: the file is missing or something else.
    """
    if not file.is_file():
        raise RunError(f"{file} does not exist; --bench takes the bench.json of 'qtdog bench --output'")
    if file.stat().st_size > MAX_LATENCY_BYTES:
        raise RunError(f"{file} has {file.stat().st_size:,} bytes, and is no file of 'qtdog bench'")
    try:
        content = json.loads(file.read_text())
        timed = tuple(_timed(row["path"], row["timing"]["p50_s"], row["runtime"]) for row in content["rows"])
        setting = f"batch {int(content['batch'])}, {int(content['threads'])} thread(s), {content['machine']['cpu']}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file} is no file of 'qtdog bench' ({error!r})") from error
    return BenchFile(timed, setting)


def _timed(path: str, p50_s: float, runtime: str) -> Timed:
    if not 0 < float(p50_s) < math.inf:
        raise ValueError(f"a call took {p50_s} s")
    return Timed(Path(path), 1000 * float(p50_s), str(runtime))


def latencies(rows: Mapping[str, Sequence[FinishedRun]], bench: BenchFile) -> dict[str, Timed]:
    """Return the time of each row of a table of which a model was measured; of several the fastest.

    A file belongs to the run in whose folder it lies, or below.

    Args:
        rows: runs by name of a row.
        bench: what was measured.
    """
    timed = [({one.path.resolve(), *one.path.resolve().parents}, one) for one in bench.timed]
    fastest: dict[str, Timed] = {}
    for label, group in rows.items():
        folders = {run.path.resolve() for run in group}
        mine = [one for parents, one in timed if folders & parents]
        if mine:
            fastest[label] = min(mine, key=lambda one: one.p50_ms)
    return fastest
