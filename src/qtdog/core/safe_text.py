"""Text that somebody else wrote: read it within bounds, write it into cells so that it stays text.

What a parsed text costs depends on its structure, not on its length: a YAML of 500 bytes whose aliases name each other
expands to millions of values, and 100,000 brackets overflow the stack of a parser. Bounds are checked first.
"""

from __future__ import annotations

import csv
import io
import json
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml

from qtdog.core.errors import QtdogError, RunError
from qtdog.core.printable import printable

MAX_YAML_BYTES = 1_000_000
MAX_JSON_BYTES = 64 * 2**20
MAX_YAML_NODES = 50_000
MAX_NESTING = 64
MAX_ITEMS = 2**19
MAX_NUMBER = 1000  # characters of a plain scalar of digits: YAML reads 1:1:1:… as a number to base 60, in square time

_JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_JSON_BRACKET = re.compile(r"[\[\]{}]")
_NUMERIC = re.compile(r"[-+0-9:._]*")

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_FULL_WIDTH = ("\uff1d", "\uff0b", "\uff0d", "\uff20")  # spreadsheets for East Asian languages take them too
_PLAIN_NUMBER = re.compile(r"…|[+-]?(inf|nan|\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def no_formula(text: str) -> str:
    r"""Return text for a cell of a CSV file that no spreadsheet takes for a formula; numbers stay, also several.

    A formula starts with one of `= + - @`, also behind blanks, tabs and line breaks; it gets a `'` before it. Several
    numbers have blanks or semicolons between them.

    Example:
        >>> no_formula("=1+1"), no_formula("-0.4"), no_formula(" =1"), no_formula("-1e-05 2.0; 3.0")
        ("'=1+1", '-0.4', "' =1", '-1e-05 2.0; 3.0')
    """
    shown = printable(text)
    starts = text.startswith(_FORMULA) or text.lstrip().startswith((*_FORMULA, *_FULL_WIDTH))
    return f"'{shown}" if starts and not all(map(_PLAIN_NUMBER.fullmatch, re.split("[ ;]+", text))) else shown


def csv_line(cells: Iterable[object]) -> str:
    r"""Return one line of a CSV file, its texts guarded by `no_formula`; None is an empty cell.

    Example:
        >>> csv_line(["=1+1", 0.5, None])
        "'=1+1,0.5,\n"
    """
    stream = io.StringIO()
    guarded = [no_formula(cell) if isinstance(cell, str) else cell for cell in cells]
    csv.writer(stream, lineterminator="\n").writerow(guarded)
    return stream.getvalue()


def require_regular(path: Path, *, kind: type[QtdogError] = RunError) -> int:
    """Return the size of a regular file.

    Raises:
        QtdogError: of that kind; it is a link, which may lead out of a received folder, or a device, or not there.
    """
    try:
        found = path.lstat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise kind(f"{path} cannot be read: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no regular file"
        raise kind(f"{path} is {what}; put the file itself there")
    return found.st_size


def read_text(path: Path, max_bytes: int, *, kind: type[QtdogError] = RunError) -> str:
    """Return the text of a regular file of at most `max_bytes`.

    Raises:
        QtdogError: of that kind, with the path and what is wrong: as in `require_regular`, too long, or not in UTF-8.
    """
    size = require_regular(path, kind=kind)
    if size > max_bytes:
        raise kind(f"{path} is damaged: it has {size:,} bytes, and {max_bytes:,} are the limit")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is damaged: it is no text in UTF-8 ({error.reason})") from error
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror or error}") from error


def parse_json(text: str, *, max_items: int = MAX_ITEMS) -> Any:
    """Return the value of a JSON text within the bounds of `check_json_extent`.

    Raises:
        ValueError: no JSON, or one beyond the bounds.
    """
    check_json_extent(text, max_items=max_items)
    return json.loads(text)


def check_json_extent(text: str, *, max_items: int = MAX_ITEMS) -> None:
    """Refuse a JSON text whose value would take far more memory than its length says.

    Raises:
        ValueError: nesting deeper than 64, or more than `max_items` items (commas and opening brackets outside of
            strings).
    """
    bare = _JSON_STRING.sub("", text)
    n_items = bare.count(",") + bare.count("[") + bare.count("{")
    if n_items > max_items:
        raise ValueError(f"it has {n_items} items, and {max_items} are the limit")
    depth = 0
    for match in _JSON_BRACKET.finditer(bare):
        depth += 1 if match[0] in "[{" else -1
        if depth > MAX_NESTING:
            raise ValueError("it is nested too deeply")


def read_json(
    path: Path, *, max_bytes: int = MAX_JSON_BYTES, max_items: int = MAX_ITEMS, kind: type[QtdogError] = RunError
) -> Any:
    """Return the value in a JSON file.

    Raises:
        QtdogError: of that kind, with the path: as in `read_text`, no JSON, or one beyond the bounds of `parse_json`.
    """
    text = read_text(path, max_bytes, kind=kind)
    try:
        return parse_json(text, max_items=max_items)
    except ValueError as error:
        raise kind(f"{path} is damaged: it is not valid JSON ({error})") from error


def parse_yaml(text: str) -> tuple[Any, Any]:
    """Return what YAML makes of a text, and the same with every scalar as the text has it.

    YAML reads NO as False and 010 as 8, and both may be names.

    Raises:
        ValueError: no YAML; more than a million characters, anchors with aliases, or nesting deeper than 64.

    Example:
        >>> parse_yaml("{a: NO, b: 010}")
        ({'a': False, 'b': 8}, {'a': 'NO', 'b': '010'})
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has {len(text):,} characters, and {MAX_YAML_BYTES:,} are the limit")
    loader = cast(type[yaml.SafeLoader], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        _check_events(text, loader)
        made = loader(text)
        try:
            node = made.get_single_node()
            if node is None:
                return None, None
            return made.construct_document(node), _texts(node)
        finally:
            made.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (OverflowError, RecursionError, AttributeError, LookupError, TypeError) as error:  # a tag that does not fit
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _check_events(text: str, loader: type[yaml.SafeLoader]) -> None:
    depth = n_nodes = 0
    for event in yaml.parse(text, loader):
        n_nodes += isinstance(event, yaml.NodeEvent)
        if n_nodes > MAX_YAML_NODES:
            raise ValueError(f"it has more than {MAX_YAML_NODES:,} values")
        if isinstance(event, yaml.AliasEvent):
            where = event.start_mark
            line = f", line {where.line + 1}" if where is not None else ""
            raise ValueError(f"it has an alias (*{event.anchor}{line}): write the values out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_NESTING:
                raise ValueError("it is nested too deeply")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_NUMBER and _NUMERIC.fullmatch(event.value):
            raise ValueError(f"it has a number of {len(event.value):,} digits")


def _texts(node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {str(_texts(key)): _texts(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_texts(value) for value in node.value]
    return node.value
