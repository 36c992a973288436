"""Asking the index: a condition in SQL, and nothing but reading."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from qtdog.core.errors import ConfigError, unknown
from qtdog.sweep.index_row import COLUMNS, Row

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
