"""What an analysis hands on: one small JSON with what it is, its numbers and its figures."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qtdog.analysis.points import write_table
from qtdog.core.files import write_atomic

OUTCOME = "analysis.json"


@dataclass(frozen=True)
class Outcome:
    """The result of one analysis of some runs.

    Attributes:
        kind: the command that made it, such as `flatness`.
        title: one line for a heading.
        settings: what it depends on besides the runs.
        runs: per run its `label`, `folder`, `config_hash` and `model` (beginning of the sha256 of the model file).
        numbers: rows of a table, all with the same columns; also in `KIND.csv`.
        figures: file names beside the JSON, PNG and PDF.
        notes: sentences that a reader of the numbers must know.
    """

    kind: str
    title: str
    settings: Mapping[str, Any]
    runs: Sequence[Mapping[str, Any]]
    numbers: Sequence[Mapping[str, Any]]
    figures: Sequence[str]
    notes: Sequence[str] = field(default_factory=tuple)


def write_outcome(folder: Path, outcome: Outcome) -> dict[str, Any]:
    """Write `analysis.json` and `KIND.csv` and return what the JSON says.

    A number that is not finite becomes null, since JSON has none; the CSV keeps it.

    Raises:
        RunError: the disk is full or not writable.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> said = write_outcome(folder, Outcome("stability", "Stability", {}, [], [{"run": "a", "drop": 0.1}], []))
        >>> said["kind"], said["data"]
        ('stability', ['stability.csv'])
    """
    data = f"{outcome.kind}.csv"
    write_table(folder / data, outcome.numbers)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    said = _finite(asdict(outcome) | {"data": [data], "date": today})
    write_atomic(folder / OUTCOME, json.dumps(said, indent=1, allow_nan=False))
    return said


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
