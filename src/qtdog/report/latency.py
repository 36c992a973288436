"""Latencies that `qtdog bench` measured, by run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import RunError
from qtdog.report.entry import Entry

MAX_FILE_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Latency:
    """How long a forward pass takes.

    Attributes:
        p50_ms: median, in milliseconds.
        how: runtime and the like, for people.
    """

    p50_ms: float
    how: str


def read_bench(file: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a JSON file of `qtdog bench`: each has at least `file` and `p50_ms`.

    Raises:
        RunError: the file is missing or something else.
    """
    if not file.is_file():
        raise RunError(f"{file} does not exist; --bench takes the JSON of 'qtdog bench'")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise RunError(f"{file} has {file.stat().st_size:,} bytes, and is no JSON of 'qtdog bench'")
    try:
        rows = json.loads(file.read_text())["rows"]
        for row in rows:
            if not (isinstance(row["file"], str) and 0 < float(row["p50_ms"]) < math.inf):
                raise ValueError(f"row {row!r:.80}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file} is no JSON of 'qtdog bench' ({error!r})") from error
    return rows


def latencies(rows: Mapping[str, Sequence[Entry]], bench: Sequence[Mapping[str, Any]]) -> dict[str, Latency]:
    """Return the latency of each row of a table of which a run was measured; of several rows of one file the fastest.

    Args:
        rows: entries by name of a row.
        bench: from `read_bench`; a file belongs to the run whose folder it lies in, or below.
    """
    found: dict[str, Latency] = {}
    for label, group in rows.items():
        folders = {entry.path.resolve() for entry in group}
        mine = [one for one in bench if folders & {Path(one["file"]).resolve(), *Path(one["file"]).resolve().parents}]
        if mine:
            best = min(mine, key=lambda one: float(one["p50_ms"]))
            found[label] = Latency(float(best["p50_ms"]), str(best.get("runtime", "")))
    return found
