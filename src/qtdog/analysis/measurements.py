"""What analyses have in common: measurements in a CSV that grows row by row, the result in one JSON, figures."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtdog.core.errors import FormatError, RunError
from qtdog.core.files import clear_disk_errors, write_atomic
from qtdog.core.printable import legend_columns
from qtdog.core.safe_text import csv_line, no_formula, read_json, read_text

POINTS = "points.csv"
SETTINGS = "settings.json"
MAX_POINTS_BYTES = 512 * 2**20
MAX_SETTINGS_BYTES = 16 * 2**20
Row = dict[str, str]


class Measurements:
    """The rows of `points.csv` in the folder of one analysis, and the settings that they were measured with.

    A row is one unit of work, written durably as soon as it is known. The first columns are its key. A last line that a
    crash cut off is dropped, and measured again.

    Args:
        folder: of the analysis; made if it is missing.
        key: names of the columns that say which unit of work a row is.
        values: names of the columns that say what was found.
        settings: all that the values depend on besides the key; anything that JSON can hold.

    Raises:
        RunError: the folder holds rows of other settings (each difference is named), or cannot be written.
        FormatError: the file there has other columns.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Measurements(folder, ["n"], ["loss"], {"seed": 0}).add_([1], [0.5])
        >>> again = Measurements(folder, ["n"], ["loss"], {"seed": 0})
        >>> 1 in again, again.rows
        (True, [{'n': '1', 'loss': '0.5'}])
    """

    def __init__(self, folder: Path, key: Sequence[str], values: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.file = folder / POINTS
        self.key = tuple(key)
        self.columns = (*key, *values)
        self.rows: list[Row] = []
        _claim(folder, json.loads(json.dumps(settings)))
        if self.file.is_file():
            self._read()
        else:
            write_atomic(self.file, csv_line(self.columns))
        self._done = {self._key_of(row) for row in self.rows}

    def _read(self) -> None:
        text = read_text(self.file, MAX_POINTS_BYTES, kind=FormatError)
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_atomic(self.file, whole)
        reader = csv.DictReader(io.StringIO(whole))
        if tuple(reader.fieldnames or ()) != self.columns:
            raise FormatError(f"{self.file} has other columns than {', '.join(self.columns)}; choose another --output")
        self.rows = list(reader)

    def _key_of(self, row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in self.key)

    def __contains__(self, key: object) -> bool:
        """Return whether the unit of work with this key (one value, or a tuple of them) is done."""
        parts = key if isinstance(key, tuple) else (key,)
        return tuple(_text(part) for part in parts) in self._done

    def add_(self, key: Sequence[Any], values: Sequence[Any]) -> None:
        """Keep one row, durably; numbers are written so that they read back exactly.

        Raises:
            RunError: the disk is full or not writable.
        """
        self.add_all_([(key, values)])

    def add_all_(self, pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> None:
        """Keep several rows, pairs of key and values, as `add_` does, in one go.

        Raises:
            RunError: the disk is full or not writable.
        """
        rows = [[_text(part) for part in (*key, *values)] for key, values in pairs]
        with clear_disk_errors(self.file), self.file.open("a") as stream:
            stream.write("".join(map(csv_line, rows)))
            stream.flush()
            os.fsync(stream.fileno())
        added = [dict(zip(self.columns, cells, strict=True)) for cells in rows]
        self.rows += added
        self._done |= {self._key_of(row) for row in added}

    def of(self, **key: Any) -> list[Row]:
        """Return the rows in which the named columns have these values, in the order in which they were measured."""
        wanted = {name: _text(value) for name, value in key.items()}
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    r"""Write rows of the same columns as CSV; a missing number is an empty cell.

    Raises:
        RunError: the disk is full or not writable.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.csv"
        >>> write_table(file, [{"run": "float", "loss": 0.5}])
        >>> file.read_text()
        'run,loss\nfloat,0.5\n'
    """
    lines = [csv_line(rows[0])] if rows else []
    write_atomic(file, "".join([*lines, *(csv_line(row.values()) for row in rows)]))


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder that of these settings, or check that it is."""
    file = folder / SETTINGS
    if not file.is_file():
        write_atomic(file, json.dumps(settings, indent=1))
        return
    try:
        kept = read_json(file, max_bytes=MAX_SETTINGS_BYTES, kind=FormatError)
    except FormatError as error:
        raise FormatError(f"{error}; choose another --output") from error
    if not isinstance(kept, dict):
        raise FormatError(f"{file} is no object of settings; choose another --output")
    names = [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]
    if names:
        changes = "\n  ".join(f"{name}: {kept.get(name)!r} → {settings.get(name)!r}" for name in names)
        raise RunError(f"{folder} holds this analysis with other settings:\n  {changes}\nChoose another --output.")


def _text(value: Any) -> str:
    """Return a cell as its file has it, so that what is read can be compared with what is asked for."""
    return "" if value is None else repr(value) if isinstance(value, float) else no_formula(str(value))


OUTCOME = "analysis.json"


@dataclass(frozen=True)
class AnalysisResult:
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


def write_result(folder: Path, result: AnalysisResult) -> dict[str, Any]:
    """Write `analysis.json` and `KIND.csv` and return its content.

    A number that is not finite becomes null, since JSON has none; the CSV keeps it.

    Raises:
        RunError: the disk is full or not writable.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> result = AnalysisResult("stability", "Stability", {}, [], [{"run": "a", "drop": 0.1}], [])
        >>> written = write_result(folder, result)
        >>> written["kind"], written["data"]
        ('stability', ['stability.csv'])
    """
    data = f"{result.kind}.csv"
    write_table(folder / data, result.numbers)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    written = _finite(asdict(result) | {"data": [data], "date": today})
    write_atomic(folder / OUTCOME, json.dumps(written, indent=1, allow_nan=False))
    return written


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


# Okabe and Ito, 2008: distinguishable for readers who see few colors, and in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
MAX_PANELS_WIDE = 4


def curve_style(n: int) -> dict[str, Any]:
    """Return color and marker of curve number `n`: after eight they begin anew, with another pairing.

    Example:
        >>> curve_style(0), curve_style(0) == curve_style(8)
        ({'color': '#0072B2', 'marker': 'o'}, False)
    """
    shift = n // len(COLORS)
    return {"color": COLORS[n % len(COLORS)], "marker": MARKERS[(n + shift) % len(MARKERS)]}


def panels(n: int, *, width: float = 4.4, height: float = 3.6, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure with `n` panels, at most four in a row."""
    columns = min(n, MAX_PANELS_WIDE)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharey=share_y, layout="constrained"
    )
    flat = [axis for row in axes for axis in row]
    for axis in flat[n:]:
        axis.remove()
    return figure, flat[:n]


def escape_dollar(text: str) -> str:
    r"""Return a name as it is: a dollar sign in it begins no formula.

    Example:
        >>> print(escape_dollar("a$b"))
        a\$b
    """
    return text.replace("$", r"\$")


def legend(figure: Figure, axis: Axes) -> None:
    """Put the legend of one panel below the figure."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        ncols = legend_columns(labels, figure.get_figwidth())
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=8)


def save_figure(figure: Figure, folder: Path, name: str) -> list[str]:
    """Write a figure as PNG and PDF, close it, and return the names of the files.

    The files hold no date, so that the same numbers give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}.png", f"{name}.pdf"]
    figure.savefig(folder / names[0], dpi=110)
    figure.savefig(folder / names[1], metadata={"CreationDate": None})
    plt.close(figure)
    return names


def mark_start(axis: Axes, steps: Sequence[int | None]) -> None:
    """Mark the steps at which quantization begins, each once."""
    for n, step in enumerate(sorted({step for step in steps if step is not None})):
        axis.axvline(step, color="#666666", linestyle=":", label="quantization starts" if n == 0 else None)
