"""An index over run folders: an SQLite file that is only a cache, and queries on it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qtdog.core.config import AFTER_TRAINING, Config
from qtdog.core.errors import ConfigError, RunError, unknown
from qtdog.core.safe_text import read_json
from qtdog.runs.find import SMALL_FILES, is_shared_steps, read_run, run_folders, sweep_folders
from qtdog.runs.finished import FinishedRun, read_failure_reasons, read_labels, state_folder, study_files
from qtdog.runs.folder import RunFolder, last_line
from qtdog.runs.selection import apply_selection

Value = str | int | float | None
IndexRow = dict[str, Value]
RowReader = Callable[[Path, str], IndexRow | None]

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
MODEL_FILE = "model.safetensors"
MAX_DIAGNOSIS_BYTES = 16 * 2**20
ROW_VERSION = 5  # of what `read_row` computes, so that an older index is read anew


def signature(folder: Path) -> str:
    """Return what changes whenever a run folder's row could: which its small files are, their times and sizes.

    The time of the last change of the inode is none that a program can set: a file that got the size and the date of
    another one is seen.
    """
    parts = [f"v{ROW_VERSION}"]
    for name in (*SMALL_FILES, MODEL_FILE):
        try:
            stat = (folder / name).lstat()
            parts.append(f"{name}:{stat.st_ino}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_size}")
        except OSError:
            continue
    return " ".join(parts)


def read_row(folder: Path, failure: str = "") -> IndexRow | None:
    """Return what is known of the run or ensemble in a folder; None if it holds neither.

    Accuracies are fractions, of the model file. `mean_after_start` and `std_after_start` (of the population) are over
    the evaluations after the start step, of a float run after 40 % of the steps; None where such evaluations are not of
    what is saved (`runs.selection.apply_selection`). `step` is that of the last evaluation. `state` is one of done,
    failed, unfinished and damaged; `error` says which file of a damaged run is not what it should be.

    Args:
        folder: of the run.
        failure: why the sweep could not do it, if that is known.
    """
    try:
        run = read_run(folder)
        config = RunFolder(folder).read_config() if run is None else run.config
        reason = failure or _collapse(folder)
    except (RunError, ConfigError) as error:
        if not _looks_like_run(folder):
            return None
        return {"folder": str(folder), "kind": "run", "state": "damaged", "error": " ".join(str(error).split())}
    if run is not None:
        return finished_row(run)
    if config is None:
        return None
    row = _config_row(config) | _folder_row(folder)
    return row | {"state": "failed" if reason else "unfinished", "error": reason or None}


def _looks_like_run(folder: Path) -> bool:
    """Return whether a folder has more of a run than a `config.yaml`, which other programs have too."""
    others = (*SMALL_FILES, MODEL_FILE, ".lock", "checkpoint")
    return any((folder / name).exists() for name in others if name != "config.yaml")


def finished_row(run: FinishedRun) -> IndexRow:
    """Return the row of a finished run or ensemble."""
    row = {"state": "done", "error": None} | _result_row(run)
    if run.config is None:
        return row | {"folder": str(run.path), "kind": run.kind}
    return _config_row(run.config) | _folder_row(run.path) | row


def _folder_row(folder: Path) -> IndexRow:
    kind = "fork_point" if is_shared_steps(folder) else "run"
    step = last_line(RunFolder(folder).metrics_file).get("step")
    return {"folder": str(folder), "kind": kind, "step": step if is_index_number(step) else None}


def _collapse(folder: Path) -> str:
    """Return why a run collapsed; empty if it did not."""
    file = RunFolder(folder).diagnosis_file
    if not file.is_file():
        return ""
    content = read_json(file, max_bytes=MAX_DIAGNOSIS_BYTES)
    return str(content.get("text", "")) if isinstance(content, Mapping) else ""


def _config_row(config: Config) -> IndexRow:
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


def _result_row(run: FinishedRun) -> IndexRow:
    keys = ("dataset", "selected_step", "source_accuracy", "test_accuracy", "trained_s")
    row: IndexRow = {key: run.result.get(key) for key in keys}
    row |= {"size_bytes": int(run.cost.size["bytes"]), "members": run.cost.n_models}
    if run.kind == "ensemble":
        return row | {
            "target": run.result.get("target_domain"),
            "seed": run.replicate.seed,
            "trial": run.replicate.trial,
        }
    mean = apply_selection(run, "mean")
    if mean is None or mean.target is None:
        return row
    late = [record.test_accuracy for record in run.records if record.seen.step > run.mean_from]
    spread = math.fsum((value - mean.target) ** 2 for value in late if value is not None) / len(late)
    return row | {"mean_after_start": mean.target, "std_after_start": math.sqrt(spread)}


INDEX_VERSION = 2
SCHEMA = f"""
CREATE TABLE folders ({", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())}, signature TEXT);
CREATE TABLE labels (folder TEXT, study TEXT, method TEXT, labels TEXT);
CREATE INDEX by_folder ON labels (folder);
CREATE VIEW runs AS SELECT labels.study AS study, labels.method AS method, labels.labels AS labels,
  {", ".join(f"folders.{name} AS {name}" for name in COLUMNS)}
  FROM folders LEFT JOIN labels ON labels.folder = folders.folder WHERE folders.kind != 'fork_point';
PRAGMA user_version = {INDEX_VERSION};
"""


def index_file(root: Path) -> Path:
    """Return where the index of the runs below `root` lies."""
    return state_folder(root) / "index.sqlite"


def refresh(root: Path, *, read: RowReader = read_row) -> Path | sqlite3.Connection:
    """Bring the index of all runs below `root` up to date and return its file; only what changed is read again.

    An index that is damaged, of another version, or not of the schema that this program writes (it may have come with a
    received folder) is made anew. Where the folder cannot be written, or its disk is full, an index in memory is made
    and returned instead.

    The view `runs` has a row for each run and each study (or method of one) that names it; `study` and `method` are
    NULL where none does.

    Args:
        root: the folder.
        read: returns the row of a folder, given why the sweep could not do it ("" if that is not known).
    """
    file = index_file(root)
    for _ in range(2):
        try:
            _require_own_file(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            database = _open(file)
            try:
                _fill(database, root, read)
            finally:
                database.close()
            return file
        except (OSError, sqlite3.OperationalError):  # not writable, full, or in use
            break
        except (sqlite3.DatabaseError, UnicodeDecodeError):  # damaged where the check did not look
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
    database = sqlite3.connect(":memory:")
    database.executescript(SCHEMA)
    _fill(database, root, read)
    return database


def _require_own_file(file: Path) -> None:
    """Remove a link in the place of the index, and a folder with one: what is written there would lie elsewhere."""
    if file.is_symlink():
        file.unlink()
    if file.parent.is_symlink():
        raise OSError(f"{file.parent} is a link")


def _fill(database: sqlite3.Connection, root: Path, read: RowReader) -> None:
    with database:
        _refresh_folders(database, root, read)
        _refresh_labels(database, root)


def _open(file: Path) -> sqlite3.Connection:
    """Return the database; one that is damaged, of another version or of another schema is thrown away."""
    for attempt in (1, 2):
        database = sqlite3.connect(file, timeout=30)
        try:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == INDEX_VERSION and _schema(database) == own_schema() and _is_whole(database):
                return database
            if version == 0 and not _schema(database):
                database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
                return database
        except sqlite3.OperationalError:  # not writable, or in use: not damaged
            database.close()
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            if attempt == 2:
                raise
        database.close()
        file.unlink(missing_ok=True)
    raise sqlite3.OperationalError(f"{file} cannot be made")


def _schema(database: sqlite3.Connection) -> set[tuple[str, str, str]]:
    return set(database.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_master").fetchall())


@cache
def own_schema() -> set[tuple[str, str, str]]:
    """Return what an index has, as SQLite describes it: no trigger, and no view but ours."""
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(SCHEMA)
        return _schema(database)
    finally:
        database.close()


def _is_whole(database: sqlite3.Connection) -> bool:
    return database.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"


def _refresh_folders(database: sqlite3.Connection, root: Path, read: RowReader) -> None:
    known = dict(database.execute("SELECT folder, signature FROM folders").fetchall())
    failures = {out: read_failure_reasons(out) for out in sweep_folders(root)}
    seen = set()
    for folder in run_folders(root):
        name = _storable(str(folder.relative_to(root)))
        failure = failures.get(folder.parent, {}).get(folder.name, "")
        now = f"{signature(folder)} {failure}"
        seen.add(name)
        if known.get(name) == now:
            continue
        row = read(folder, failure)
        database.execute("DELETE FROM folders WHERE folder = ?", (name,))
        if row is not None:
            _insert(database, row | {"folder": name, "signature": now})
    database.executemany("DELETE FROM folders WHERE folder = ?", [(name,) for name in known.keys() - seen])


def _insert(database: sqlite3.Connection, row: IndexRow) -> None:
    names = ", ".join(row)
    marks = ", ".join("?" for _ in row)
    values = tuple(_storable(value) for value in row.values())
    database.execute(f"INSERT INTO folders ({names}) VALUES ({marks})", values)


def _storable(value: Any) -> Any:
    """Return what SQLite takes: text that is UTF-8 (file names need not be), integers of 64 bits."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    too_large = isinstance(value, int) and not isinstance(value, bool) and not is_index_number(value)
    return str(value) if too_large else value


def is_index_number(value: object) -> bool:
    """Return whether a value is an integer that SQLite can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _refresh_labels(database: sqlite3.Connection, root: Path) -> None:
    database.execute("DELETE FROM labels")
    for out in sweep_folders(root):
        prefix = out.relative_to(root)
        for file in study_files(out):
            rows = [
                tuple(map(_storable, (str(prefix / name), file.stem, labels.get("method"), json.dumps(labels))))
                for name, several in read_labels(file).items()
                for labels in several
            ]
            database.executemany("INSERT INTO labels VALUES (?, ?, ?, ?)", rows)


LABELS = ("study", "method", "labels")
MAX_S = 10.0
ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
FORBIDDEN = ("load_extension", "randomblob", "zeroblob")


def ask(
    index: Path | sqlite3.Connection,
    condition: str = "",
    *,
    columns: Sequence[str] = (),
    order: str = "folder",
    max_s: float = MAX_S,
) -> list[IndexRow]:
    """Return the rows of the view `runs` that fulfil a condition.

    The database is opened for reading only, one statement is run, and SQLite itself refuses everything but reading.

    Args:
        index: from `refresh`.
        condition: an SQL expression over the columns, like "objective = 'coral' and bits = 7"; "" for all.
        columns: which ones; none for all.
        order: columns to sort by, like "test_accuracy desc", or an expression over them.
        max_s: seconds after which the query is given up.

    Raises:
        ConfigError: a column that does not exist (the text has the nearest one); a condition or order that is no SQL
            expression, tries anything but reading, or takes longer than `max_s`.
    """
    known = [*LABELS, *COLUMNS]
    for name in columns:
        if name not in known:
            raise ConfigError(unknown("column", name, known))
    for part in order.split(","):
        simple = re.fullmatch(r"([A-Za-z_]\w*)(\s+(asc|desc))?", part.strip(), re.IGNORECASE)
        if simple and simple[1] not in known:
            raise ConfigError(f"--order: {unknown('column', simple[1], known)}")
    wanted = ", ".join(columns) or "*"
    where = f"WHERE ({condition}\n)" if condition.strip() else ""
    database = sqlite3.connect(f"file:{index}?mode=ro", uri=True) if isinstance(index, Path) else index
    database.row_factory = sqlite3.Row
    deadline = time.monotonic() + max_s
    database.set_authorizer(_may)
    database.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
    tried = condition
    try:
        # LIMIT 0 compiles the condition and reads nothing: what fails after it is the order
        database.execute(f"SELECT 1 FROM runs {where} LIMIT 0").fetchall()
        tried = condition if order == "folder" else order
        rows = database.execute(f"SELECT {wanted} FROM runs {where} ORDER BY {order}").fetchall()
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise ConfigError(_explain(str(error), tried, known, max_s, is_order=tried is order)) from error
    finally:
        database.set_authorizer(None)
        database.set_progress_handler(None, 0)
        if isinstance(index, Path):
            database.close()
    return [dict(row) for row in rows]


def _may(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    del first
    if action not in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second in FORBIDDEN):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _explain(error: str, tried: str, known: Sequence[str], max_s: float, *, is_order: bool) -> str:
    prefix = "--order: " if is_order else ""
    missing = re.fullmatch(r"no such column: (\S+)", error)
    if missing:
        text = prefix + unknown("column", missing[1], known)
        return text if is_order else f"{text}\nA text is written in single quotes: objective = 'coral'"
    if "not authorized" in error or "prohibited" in error:
        return f"{prefix}'{tried}': the index can only be read"
    if error == "interrupted":
        return f"{prefix}'{tried}' took longer than {max_s:.0f} seconds"
    if is_order:
        takes = f"It takes columns, like 'test_accuracy desc': {', '.join(known)}"
        return f"--order '{tried}' is nothing to sort by: {error}. {takes}"
    return f"'{tried}' is no condition in SQL: {error}. Example: objective = 'coral' and bits = 7"
