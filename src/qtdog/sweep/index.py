"""An index over run folders: an SQLite file that is only a cache, and queries on it."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qtdog.core.config import AFTER_TRAINING, Config
from qtdog.core.errors import ConfigError, unknown
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import Outcome, last_line, read_failures, read_labels, state_folder

Value = str | int | float | None
Row = dict[str, Value]

# Column → SQLite type, in the order in which they are shown; study, method and labels are in a table of their own.
COLUMNS = {
    "folder": "TEXT PRIMARY KEY",
    "kind": "TEXT",
    "state": "TEXT",
    "dataset": "TEXT",
    "target": "TEXT",
    "seed": "INTEGER",
    "trial": "INTEGER",
    "backbone": "TEXT",
    "objective": "TEXT",
    "step_rule": "TEXT",
    "feature_layer": "TEXT",
    "averager": "TEXT",
    "quantizer": "TEXT",
    "bits": "INTEGER",
    "schedule": "TEXT",
    "lr": "REAL",
    "image_size": "INTEGER",
    "batch_size": "INTEGER",
    "steps": "INTEGER",
    "start_step": "INTEGER",
    "step": "INTEGER",
    "selected_step": "INTEGER",
    "source_accuracy": "REAL",
    "test_accuracy": "REAL",
    "mean_after_start": "REAL",
    "std_after_start": "REAL",
    "size_bytes": "INTEGER",
    "trained_s": "REAL",
    "members": "INTEGER",
    "error": "TEXT",
    "config": "TEXT",
}
AVERAGED_AT_END = ("swa", "swad", "bma")  # until then evaluations are of the raw weights
ROW_VERSION = 2  # of what `read_row` computes, so that an older index is read anew
FILES = ("config.yaml", "metrics.jsonl", "result.json", "diagnosis.json")


def signature(folder: Path) -> str:
    """Return what changes whenever a run folder's row could: times and sizes of its small files."""
    parts = [f"v{ROW_VERSION}"]
    for name in FILES:
        try:
            stat = (folder / name).stat()
            parts.append(f"{name}:{stat.st_mtime_ns}:{stat.st_size}")
        except OSError:
            continue
    return " ".join(parts)


def read_row(folder: Path, failure: Outcome | None = None) -> Row | None:
    """Return what is known of the run or ensemble in a folder; None if it holds neither, or files that are damaged.

    Accuracies are fractions. `mean_after_start` and `std_after_start` (of the population) are over the evaluations
    behind the start step, for a float run behind 40 % of the steps; None where such evaluations are not of what ships:
    with SWA, SWAD and BMA, quantizers that work after training, and INQ, which has not frozen all by then. `step` is
    that of the last evaluation, `state` one of done, failed and unfinished.

    Args:
        folder: of the run.
        failure: why the sweep could not do it, if that is known.
    """
    try:
        result = _json(folder / "result.json")
        tree = yaml.load((folder / "config.yaml").read_text(), yaml.CSafeLoader) if _has_config(folder) else None
        if tree is None:
            return _ensemble_row(folder, result) if result and "members" in result else None
        row = _config_row(Config.model_validate(tree)) | _result_row(result)
        row |= _metrics_row(RunFolder(folder).metrics_file, row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
    row |= {"kind": "prefix" if folder.name.startswith("prefix-") else "run", "folder": str(folder)}
    row |= _state_row(folder, result, failure)
    return row


def _has_config(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _state_row(folder: Path, result: dict[str, Any] | None, failure: Outcome | None) -> Row:
    if result is not None:
        return {"state": "done", "error": None}
    diagnosis = _json(folder / "diagnosis.json")
    reason = failure.reason if failure else diagnosis["text"] if diagnosis else None
    return {"state": "failed" if reason else "unfinished", "error": reason}


def _config_row(config: Config) -> Row:
    quantizer = config.quantizer.name
    return {
        "target": config.data.target,
        "seed": config.train.seed,
        "trial": config.data.trial,
        "backbone": config.model.backbone,
        "objective": config.objective.name,
        "step_rule": config.step_rule.name,
        "feature_layer": config.model.feature_layer,
        "averager": config.averager.name,
        "quantizer": quantizer,
        "bits": None if quantizer == "none" else config.quantizer.bits,
        "schedule": config.optimizer.schedule,
        "lr": config.optimizer.lr,
        "image_size": config.data.image_size,
        "batch_size": config.data.batch_size,
        "steps": config.train.steps,
        "start_step": config.start_step if quantizer in AFTER_TRAINING or config.start_step is not None else None,
        "config": json.dumps(config.model_dump(mode="json")),
    }


def _result_row(result: dict[str, Any] | None) -> Row:
    if result is None:
        return {}
    keys = ("dataset", "selected_step", "source_accuracy", "test_accuracy", "trained_s")
    return {key: result.get(key) for key in keys} | {"size_bytes": result["size"]["bytes"], "members": 1}


def _metrics_row(file: Path, row: Row) -> Row:
    step = last_line(file).get("step")
    if not file.is_file() or row["quantizer"] in AFTER_TRAINING or row["averager"] in AVERAGED_AT_END:
        return {"step": step}
    start, steps = row["start_step"], row["steps"]
    first = int(0.4 * float(steps or 0)) if start is None else int(start)
    found: list[float] = []
    for line in file.read_text().splitlines():
        try:
            told = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if told["step"] > first and told["test_accuracy"] is not None:
            if not told["selectable"]:
                return {"step": step}
            found.append(told["test_accuracy"])
    mean, std = _spread(found)
    return {"step": step, "mean_after_start": mean, "std_after_start": std}


def _spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _ensemble_row(folder: Path, result: dict[str, Any]) -> Row:
    first = result["members"][0]
    return {
        "folder": str(folder),
        "kind": "ensemble",
        "state": "done",
        "dataset": result.get("dataset"),
        "target": result.get("target_domain"),
        "seed": first.get("seed"),
        "trial": first.get("trial"),
        "source_accuracy": result.get("source_accuracy"),
        "test_accuracy": result.get("test_accuracy"),
        "size_bytes": result["size"]["bytes"],
        "members": len(result["members"]),
    }


INDEX_VERSION = 1
DEPTH = 4  # folders below the root in which runs are looked for
SKIPPED = ("checkpoint", ".sweep")
SCHEMA = f"""
CREATE TABLE folders ({", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())}, signature TEXT);
CREATE TABLE labels (folder TEXT, study TEXT, method TEXT, labels TEXT);
CREATE INDEX by_folder ON labels (folder);
CREATE VIEW runs AS SELECT labels.study AS study, labels.method AS method, labels.labels AS labels,
  {", ".join(f"folders.{name} AS {name}" for name in COLUMNS)}
  FROM folders LEFT JOIN labels ON labels.folder = folders.folder WHERE folders.kind != 'prefix';
PRAGMA user_version = {INDEX_VERSION};
"""


def index_file(root: Path) -> Path:
    """Return where the index of the runs below `root` lies."""
    return state_folder(root) / "index.sqlite"


def refresh(root: Path) -> Path:
    """Bring the index of all runs below `root` up to date and return its file; only what changed is read again.

    The view `runs` has a row for each run and each study (or method of one) that names it; `study` and `method` are
    NULL where none does.

    Raises:
        OSError, sqlite3.Error: the folder cannot be written.
    """
    file = index_file(root)
    file.parent.mkdir(parents=True, exist_ok=True)
    database = _open(file)
    try:
        with database:
            _refresh_folders(database, root)
            _refresh_labels(database, root)
    finally:
        database.close()
    return file


def _open(file: Path) -> sqlite3.Connection:
    """Return the database; a damaged one, or one of another version, is thrown away."""
    for attempt in (1, 2):
        database = sqlite3.connect(file, timeout=30)
        try:
            found = database.execute("PRAGMA user_version").fetchone()[0]
            if found == INDEX_VERSION:
                return database
            if found == 0 and not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
                return database
        except sqlite3.DatabaseError:
            if attempt == 2:
                raise
        database.close()
        file.unlink(missing_ok=True)
    raise sqlite3.DatabaseError(f"{file} cannot be made")


def _refresh_folders(database: sqlite3.Connection, root: Path) -> None:
    known = dict(database.execute("SELECT folder, signature FROM folders").fetchall())
    failures = {out: read_failures(out) for out in _sweeps(root)}
    seen = set()
    for folder in run_folders(root):
        name = str(folder.relative_to(root))
        failure = failures.get(folder.parent, {}).get(folder.name)
        found = f"{signature(folder)} {failure.reason if failure else ''}"
        seen.add(name)
        if known.get(name) == found:
            continue
        row = read_row(folder, failure)
        database.execute("DELETE FROM folders WHERE folder = ?", (name,))
        if row is not None:
            _insert(database, row | {"folder": name, "signature": found})
    database.executemany("DELETE FROM folders WHERE folder = ?", [(name,) for name in known.keys() - seen])


def _insert(database: sqlite3.Connection, row: Row) -> None:
    names = ", ".join(row)
    marks = ", ".join("?" for _ in row)
    database.execute(f"INSERT INTO folders ({names}) VALUES ({marks})", tuple(row.values()))


def _refresh_labels(database: sqlite3.Connection, root: Path) -> None:
    database.execute("DELETE FROM labels")
    for out in _sweeps(root):
        prefix = out.relative_to(root)
        for file in sorted((state_folder(out) / "studies").glob("*.json")):
            rows = [
                (str(prefix / name), file.stem, labels.get("method"), json.dumps(labels))
                for name, several in read_labels(file).items()
                for labels in several
            ]
            database.executemany("INSERT INTO labels VALUES (?, ?, ?, ?)", rows)


def _sweeps(root: Path) -> list[Path]:
    return sorted({folder.parent for folder in _walk(root, DEPTH) if folder.name == ".sweep"})


def run_folders(root: Path) -> list[Path]:
    """Return the folders below `root` that hold a run or an ensemble, sorted."""
    return sorted(path for path in _walk(root, DEPTH) if any((path / name).is_file() for name in FILES))


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth == 0 or folder.name in SKIPPED or not folder.is_dir():
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            yield from _walk(child, depth - 1)


LABELS = ("study", "method", "labels")
MAX_S = 10.0
ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
FORBIDDEN = ("load_extension", "randomblob", "zeroblob")


def ask(file: Path, condition: str = "", *, columns: Sequence[str] = (), order: str = "folder") -> list[Row]:
    """Return the rows of the view `runs` that fulfil a condition.

    The database is opened for reading only, one statement is run, and SQLite itself refuses everything but reading.

    Args:
        file: of the index (`sweep.index.refresh`).
        condition: an SQL expression over the columns, like "objective = 'coral' and bits = 7"; "" for all.
        columns: which ones; none for all.
        order: a column or expression to sort by.

    Raises:
        ConfigError: the condition is no SQL expression over the columns, tries anything but reading, or takes longer
            than ten seconds; the text has the nearest column.
    """
    known = [*LABELS, *COLUMNS]
    for name in columns:
        if name not in known:
            raise ConfigError(unknown("column", name, known))
    wanted = ", ".join(columns) or "*"
    where = f"WHERE ({condition}\n)" if condition.strip() else ""
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    database.row_factory = sqlite3.Row
    deadline = time.monotonic() + MAX_S
    database.set_authorizer(_may)
    database.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
    try:
        found = database.execute(f"SELECT {wanted} FROM runs {where} ORDER BY {order}").fetchall()
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise ConfigError(_explain(str(error), condition, known)) from error
    finally:
        database.close()
    return [dict(row) for row in found]


def _may(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    del first
    if action not in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second in FORBIDDEN):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _explain(error: str, condition: str, known: Sequence[str]) -> str:
    missing = re.fullmatch(r"no such column: (\S+)", error)
    if missing:
        text = unknown("column", missing[1], known)
        return f"{text}\nA text is written in single quotes: objective = 'coral'"
    if "not authorized" in error or "prohibited" in error:
        return f"'{condition}': the index can only be read"
    if error == "interrupted":
        return f"'{condition}' took longer than {MAX_S:.0f} seconds"
    return f"'{condition}' is no condition in SQL: {error}. Example: objective = 'coral' and bits = 7"
