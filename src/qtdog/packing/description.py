"""The description of a packed file as text, for the two versions that are written."""

from __future__ import annotations

from typing import Any

from qtdog.core.errors import FormatError
from qtdog.packing import strict_json
from qtdog.packing.layout import CODED_VERSION, PLAIN_VERSION, Entry, Layout


def plain_text(layout: Layout) -> str:
    """Return the description of a file in which every tensor lies by itself, as canonical JSON.

    Raises:
        FormatError: metadata that JSON cannot hold.

    Example:
        >>> plain_text(Layout({}, {}, {}, {"classes": ["cat"]}, {}))
        '{"aliases":{},"format_version":2,"metadata":{"classes":["cat"]},"quantized":{}}'
    """
    quantized = {name: _grid(entry) for name, entry in layout.quantized.items()}
    return _text({"format_version": PLAIN_VERSION, "quantized": quantized}, layout)


def coded_text(layout: Layout) -> str:
    """Return the description of a file whose codes and values are entropy-coded, as canonical JSON.

    Raises:
        FormatError: metadata that JSON cannot hold.
    """
    quantized = {name: _grid(entry) | {"codec": entry.codec} for name, entry in layout.quantized.items()}
    rest = {name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in layout.rest.items()}
    tree = {"format_version": CODED_VERSION, "quantized": quantized, "rest": rest, "pools": layout.pools}
    return _text(tree, layout)


def _grid(entry: Entry) -> dict[str, Any]:
    spec = entry.spec
    return {"axis": spec.axis, "bits": spec.bits, "levels": spec.levels, "shape": list(entry.shape)}


def _text(tree: dict[str, Any], layout: Layout) -> str:
    try:
        return strict_json.canonical(tree | {"aliases": layout.aliases, "metadata": layout.metadata})
    except (TypeError, ValueError) as error:
        raise FormatError(f"the metadata cannot be written as JSON: {error}") from error
