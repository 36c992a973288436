"""A CSV or JSON-lines list of images (path, class, domain) as a data set."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from qtdog.core.errors import DataError, nearest
from qtdog.data.cards import match_card
from qtdog.data.files import FileDataset, Record, require_domains, require_path
from qtdog.data.sheet import Datasheet

COLUMNS = ("path", "class", "domain")
SUFFIXES = (".csv", ".jsonl")


def open_manifest(path: Path, *, min_domains: int = 2) -> FileDataset:
    """Return the data set that a manifest lists.

    A `.csv` file has a header line with the columns path, class (or label) and domain; a `.jsonl` file has one object
    with these keys per line. Paths are relative to the manifest's folder and may not leave it.

    Raises:
        DataError: the manifest is missing or malformed, a listed file does not exist (the text gives the line), a path
            is listed twice or leaves the folder, or there are fewer domains than `min_domains`.
    """
    require_path(path, "manifest")
    root = path.parent
    records: dict[str, Record] = {}
    for line, row in _rows(path):
        record = _record(row, f"{path}, line {line}")
        if record.key in records:
            raise DataError(f"{path}, line {line}: {record.key} is listed twice")
        if not (root / record.key).is_file():
            raise DataError(f"{path}, line {line}: {root / record.key} does not exist (paths are relative to {root})")
        records[record.key] = record
    if not records:
        raise DataError(f"{path} lists no images: one line per image with {', '.join(COLUMNS)}")
    ordered = sorted(records.values())
    dataset = FileDataset(Datasheet(name=path.stem, title=f"Images listed in {path.name}"), root, ordered)
    dataset.sheet = match_card(dataset.domains, dataset.classes) or dataset.sheet
    require_domains(dataset, min_domains, path)
    return dataset


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from _csv_rows(path, stream) if path.suffix.lower() == ".csv" else _json_rows(path, stream)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _csv_rows(path: Path, stream: Iterator[str] | Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(stream, skipinitialspace=True)
    names = [(name or "").strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = names
    _require_columns(names, f"{path}, line 1")
    for row in reader:
        yield reader.line_num, row


def _json_rows(path: Path, stream: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {line} must be an object like {{"path": …, "class": …, "domain": …}}')
        _require_columns(list(row), f"{path}, line {line}")
        yield line, row


def _require_columns(names: list[str], where: str) -> None:
    for column in COLUMNS:
        accepted = ("class", "label") if column == "class" else (column,)
        if any(name in names for name in accepted):
            continue
        close = nearest(column, [name for name in names if name not in COLUMNS])
        hint = f"; rename '{close}'?" if close else "."
        raise DataError(f"{where}: the column '{column}' is missing{hint} Found: {', '.join(names) or 'none'}")


def _record(row: dict[str, Any], where: str) -> Record:
    label = row["class"] if "class" in row else row["label"]
    values = {"path": row["path"], "class": label, "domain": row["domain"]}
    for column, value in values.items():
        if value is None or not str(value).strip():
            raise DataError(f"{where}: '{column}' is empty")
    key = str(row["path"]).strip()
    if Path(key).is_absolute() or PureWindowsPath(key).drive or ".." in Path(key).parts:
        raise DataError(f"{where}: path '{key}' leaves the manifest's folder; give paths relative to it, without '..'")
    return Record(str(values["domain"]).strip(), str(label).strip(), Path(key).as_posix())
