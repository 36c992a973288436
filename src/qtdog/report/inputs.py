"""What a report shows beside the runs: finished analyses and measured latencies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import RunError
from qtdog.core.safe_text import read_json, require_regular
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


def find_analyses(paths: Sequence[Path], damaged: list[str] | None = None) -> list[Analysis]:
    """Return the analyses in or below the paths, to a depth of three folders, each once.

    Args:
        paths: where to look.
        damaged: gets a sentence for each `analysis.json` that is not what an analysis writes; they are left out.

    Raises:
        RunError: one of them is not, and `damaged` is None.
    """
    files = {file.resolve(): file for path in paths for file in _files(path, DEPTH)}
    found = []
    for file in files.values():
        try:
            found.append(_read(file))
        except RunError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
    return found


def _files(path: Path, depth: int) -> Iterator[Path]:
    if not path.is_dir():
        return
    if (path / FILE).is_file():
        yield path / FILE
    # a link would lead out of a received folder
    below = sorted(
        child
        for child in path.iterdir()
        if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")
    )
    for child in below if depth else ():
        yield from _files(child, depth - 1)


def _read(file: Path) -> Analysis:
    content = read_json(file, max_bytes=MAX_ANALYSIS_BYTES)
    try:
        beside = [_beside(file.parent, str(name)) for name in [*content["figures"], *content["data"]]]
        there = [path for path in beside if path.exists() or path.is_symlink()]
        for path in there:
            require_regular(path)
        figures = [path for path in there if path.suffix == ".png"]
        for path in figures:
            _require_png(path)
        return Analysis(
            path=file.parent,
            kind=str(content["kind"]),
            title=str(content["title"]),
            runs=[str(run["label"]) for run in content["runs"]],
            numbers=[dict(row) for row in content["numbers"]],
            notes=[str(note) for note in content["notes"]],
            figures=figures,
            files=there,
        )
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise RunError(f"{file} is not what an analysis writes ({str(error)[:200]!r}). Leave it out") from error


def _beside(folder: Path, name: str) -> Path:
    """Return the path of a file of an analysis; one outside its folder would put any picture into the page."""
    if Path(name).name != name or "\0" in name:
        raise ValueError(f"the file name {name!r} has a folder in it")
    return folder / name


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _require_png(path: Path) -> None:
    """Raise RunError unless a file begins as a PNG does: its bytes go into the page."""
    with path.open("rb") as stream:
        if stream.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            raise RunError(f"{path} is no PNG file, whatever its name says. Leave it out")


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
    content = read_json(file.resolve(), max_bytes=MAX_LATENCY_BYTES)
    try:
        timed = tuple(_timed(row["path"], row["timing"]["p50_s"], row["runtime"]) for row in content["rows"])
        setting = f"batch {int(content['batch'])}, {int(content['threads'])} thread(s), {content['machine']['cpu']}"
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise RunError(f"{file} is no file of 'qtdog bench' ({error!r})") from error
    return BenchFile(timed, setting)


def _timed(path: str, p50_s: float, runtime: str) -> Timed:
    if not 0 < float(p50_s) < math.inf:
        raise ValueError(f"a call took {p50_s} s")
    if "\0" in str(path):
        raise ValueError("a path that is none")
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
