"""Latencies that `qtdog bench` measured, by row of a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qtdog.core.errors import RunError
from qtdog.runs.entry import Entry

MAX_FILE_BYTES = 16 * 1024**2


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
    """Return what the `bench.json` of `qtdog bench --out` says; paths in it are as from the folder one is in.

    Raises:
        RunError: the file is missing or something else.
    """
    if not file.is_file():
        raise RunError(f"{file} does not exist; --bench takes the bench.json of 'qtdog bench --out'")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise RunError(f"{file} has {file.stat().st_size:,} bytes, and is no file of 'qtdog bench'")
    try:
        told = json.loads(file.read_text())
        timed = tuple(_timed(row["path"], row["timing"]["p50_s"], row["runtime"]) for row in told["rows"])
        setting = f"batch {int(told['batch'])}, {int(told['threads'])} thread(s), {told['machine']['cpu']}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file} is no file of 'qtdog bench' ({error!r})") from error
    return BenchFile(timed, setting)


def _timed(path: str, p50_s: float, runtime: str) -> Timed:
    if not 0 < float(p50_s) < math.inf:
        raise ValueError(f"a call took {p50_s} s")
    return Timed(Path(path), 1000 * float(p50_s), str(runtime))


def latencies(rows: Mapping[str, Sequence[Entry]], bench: BenchFile) -> dict[str, Timed]:
    """Return the time of each row of a table of which a model was measured; of several the fastest.

    A file belongs to the run in whose folder it lies, or below.

    Args:
        rows: entries by name of a row.
        bench: what was measured.
    """
    places = [({one.path.resolve(), *one.path.resolve().parents}, one) for one in bench.timed]
    found: dict[str, Timed] = {}
    for label, group in rows.items():
        folders = {entry.path.resolve() for entry in group}
        mine = [one for place, one in places if folders & place]
        if mine:
            found[label] = min(mine, key=lambda one: one.p50_ms)
    return found
