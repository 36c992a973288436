"""JSON as the packed file has it: canonical when written, strict when read."""

from __future__ import annotations

import json
import math
from typing import Any


def canonical(value: object) -> str:
    """Return the one way to write `value`: sorted keys, no spaces, ASCII.

    Raises:
        TypeError: something that JSON cannot hold.
        ValueError: NaN or infinity, or a circular reference.

    Example:
        >>> canonical({"b": 1, "a": [0.5, None]})
        '{"a":[0.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: no JSON, a key twice in one object, NaN or infinity, or nesting deeper than Python can follow.

    Example:
        >>> parse('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' appears twice
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} appears twice")
        found[key] = value
    return found


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
