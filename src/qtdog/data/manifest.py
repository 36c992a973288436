"""A CSV or JSON-lines list of images (path, class, domain) as a data set."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from qtdog.core.errors import DataError, nearest
from qtdog.data.cards import DatasetCard, card_for
from qtdog.data.dataset import composed, is_missing
from qtdog.data.image_folder import FileDataset, ImageFile, require_domains, require_path

DOMAIN = "domain"
SUFFIXES = (".csv", ".jsonl")
MULTI_LABEL = (
    "several classes for one image (multi-label) are not supported. "
    "Give each image one class, or train one model per class"
)


def open_manifest(path: Path, *, min_domains: int = 2, domain_column: str = DOMAIN) -> FileDataset:
    """Return the data set that a manifest lists.

    A `.csv` file has a header line with the columns path, class (or label) and domain; a `.jsonl` file has one object
    with these keys per line. Any other column can hold the domains (site, camera, month). Paths are relative to the
    manifest's folder and may not leave it.

    Args:
        path: the manifest.
        min_domains: fewest domains.
        domain_column: the column whose values are the domains.

    Raises:
        DataError: the manifest is missing or malformed, a listed file does not exist (the text gives the line), a path
            is listed twice or leaves the folder, an image has several classes, a line has more cells than there are
            columns, or there are fewer domains than `min_domains`.
    """
    require_path(path, "manifest")
    root = path.parent
    records: dict[str, ImageFile] = {}
    both = False
    for line, row in _rows(path, domain_column.strip().lower()):
        record = _record(row, f"{path}, line {line}")
        both = both or ("class" in row and "label" in row)
        if record.key in records:
            raise DataError(f"{path}, line {line}: {_twice(records[record.key], record)}")
        if not (root / record.key).is_file():
            raise DataError(f"{path}, line {line}: {_missing(root, record.key)}")
        records[record.key] = record
    if not records:
        raise DataError(f"{path} lists no images: one line per image with path, class, {domain_column}")
    _refuse_joined_classes(path, {record.label for record in records.values()})
    ordered = sorted(records.values())
    dataset = FileDataset(DatasetCard(name=path.stem, title=f"Images listed in {path.name}"), root, ordered)
    dataset.card = card_for(dataset)
    if both:
        dataset.notes = [*dataset.notes, "there are the columns 'class' and 'label': the classes are those of 'class'"]
    require_domains(dataset, min_domains, path)
    return dataset


def _rows(path: Path, domain: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and values of each row; the domain is under its own name, whatever the column is called."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = (
                _csv_rows(path, stream, domain) if path.suffix.lower() == ".csv" else _json_rows(path, stream, domain)
            )
            yield from ((line, row | {DOMAIN: row[domain]}) for line, row in rows)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is no list of lines with commas: {error}") from error


def _csv_rows(path: Path, stream: Iterator[str] | Any, domain: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(stream, skipinitialspace=True)
    names = [(name or "").strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = names
    _require_columns(names, domain, f"{path}, line 1", " (the first line names the columns, with commas between)")
    for row in reader:
        spare = row.pop(None, ())
        if any(cell.strip() for cell in spare):  # a comma too many moves all that is behind it
            text = f"has {len(names) + len(spare)} cells, but there are {len(names)} columns"
            raise DataError(f'{path}, line {reader.line_num} {text}: put a text with a comma in quotes, "like, this"')
        yield reader.line_num, row


def _json_rows(path: Path, stream: Iterator[str], domain: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {line} must be an object like {{"path": …, "class": …, "domain": …}}')
        named = {name.strip().lower(): value for name, value in row.items()}
        _require_columns(list(named), domain, f"{path}, line {line}")
        yield line, named


def _require_columns(names: list[str], domain: str, where: str, advice: str = "") -> None:
    for column in ("path", "class", "label", domain):
        if names.count(column) > 1:
            raise DataError(f"{where}: there are {names.count(column)} columns '{column}'; rename or remove one")
    for column in ("path", "class", domain):
        accepted = ("class", "label") if column == "class" else (column,)
        if any(name in names for name in accepted):
            continue
        others = [name for name in names if name not in ("path", "class", "label", domain)]
        close = nearest(column, others)
        hint = f"; rename '{close}'?" if close else "."
        if column == domain and others:
            hint += (
                f" Another column can hold the domains: --data '{where.partition(', line')[0]}:{close or others[0]}'."
            )
        raise DataError(f"{where}: the column '{column}' is missing{hint} Found: {', '.join(names) or 'none'}{advice}")


def _missing(root: Path, key: str) -> str:
    if (root / key).is_dir():
        return f"{root / key} is a folder; list each image"
    text = f"{root / key} does not exist (paths are relative to {root})"
    return f"{text}; between folders goes a /" if "\\" in key else text


def _twice(first: ImageFile, second: ImageFile) -> str:
    if first.label == second.label:
        domains = "" if first.domain == second.domain else f", in the domains '{first.domain}' and '{second.domain}'"
        return f"{second.key} is listed twice{domains}; an image has one line"
    return f"{second.key} is listed with class '{first.label}' and class '{second.label}': {MULTI_LABEL}"


def _refuse_joined_classes(path: Path, labels: set[str]) -> None:
    """A cell like "cat|dog", whose parts are classes of other images, means two classes."""
    for label in sorted(labels):
        for separator in ("|", ";", ","):
            parts = [part.strip() for part in label.split(separator)]
            if len(parts) > 1 and any(part in labels for part in parts):
                raise DataError(f"{path}: the class '{label}' looks like {len(parts)} classes: {MULTI_LABEL}")


def _record(row: dict[str, Any], where: str) -> ImageFile:
    label = row["class"] if "class" in row else row["label"]
    if isinstance(label, (list, dict)):
        raise DataError(f"{where}: the class is a list: {MULTI_LABEL}")
    values = {"path": row["path"], "class": label, DOMAIN: row[DOMAIN]}
    for column, value in values.items():
        if isinstance(value, (list, dict)):
            raise DataError(f"{where}: '{column}' is a list; give one text")
        if value is None or not str(value).strip():
            raise DataError(f"{where}: '{column}' is empty")
        if column != "path" and is_missing(str(value).strip()):
            hint = "if it is a name, call it otherwise" if isinstance(value, str) else "leave the image out"
            raise DataError(f"{where}: '{column}' is {value}, which means that there is none; {hint}")
    key = str(row["path"]).strip()
    if Path(key).is_absolute() or PureWindowsPath(key).drive or ".." in Path(key).parts:
        text = f"path '{key}' is absolute or leaves the manifest's folder"
        raise DataError(f"{where}: {text}; give paths relative to it, without '..'")
    return ImageFile(composed(str(values[DOMAIN]).strip()), composed(str(label).strip()), Path(key).as_posix())
