"""An index over run folders: an SQLite file that is only a cache, made anew when it is gone."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from qtdog.sweep.index_row import COLUMNS, FILES, Row, read_row, signature
from qtdog.sweep.notes import read_failures, read_labels, state_folder

VERSION = 1
DEPTH = 4  # folders below the root in which runs are looked for
SKIPPED = ("checkpoint", ".sweep")
SCHEMA = f"""
CREATE TABLE folders ({", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())}, signature TEXT);
CREATE TABLE labels (folder TEXT, study TEXT, method TEXT, labels TEXT);
CREATE INDEX by_folder ON labels (folder);
CREATE VIEW runs AS SELECT labels.study AS study, labels.method AS method, labels.labels AS labels,
  {", ".join(f"folders.{name} AS {name}" for name in COLUMNS)}
  FROM folders LEFT JOIN labels ON labels.folder = folders.folder WHERE folders.kind != 'prefix';
PRAGMA user_version = {VERSION};
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
            if found == VERSION:
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
