"""The description inside a packed file: which tensors are codes, on which grid, and under which further names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import FormatError
from qtdog.core.quantized import LEVELS, MAX_BITS, MIN_BITS, QuantSpec
from qtdog.packing import strict_json
from qtdog.packing.bits import packed_bytes
from qtdog.packing.header import Header, TensorInfo, is_count, is_shape, read_header

FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 had no levels: all its grids are uniform
KEY = "qtdog"
FIELDS = {"format_version", "quantized", "aliases", "metadata"}


@dataclass(frozen=True)
class Entry:
    """The grid and the shape of one quantized weight."""

    spec: QuantSpec
    shape: tuple[int, ...]

    @property
    def n_codes(self) -> int:
        """Codes of the weight."""
        n_codes = 1
        for dim in self.shape:
            n_codes *= dim
        return n_codes

    @property
    def stored(self) -> tuple[TensorInfo, TensorInfo]:
        """What the codes and the scale must be in the file."""
        n_scales = 1 if self.spec.axis is None else self.shape[self.spec.axis]
        codes = TensorInfo("U8", (packed_bytes(self.n_codes, self.spec.bits),))
        return codes, TensorInfo("F32", (n_scales,))


@dataclass(frozen=True)
class Layout:
    """The whole description.

    Attributes:
        quantized: weight name to its grid and shape.
        aliases: further names of stored tensors (tied weights), each with the name it is stored under.
        metadata: the caller's.
    """

    quantized: dict[str, Entry]
    aliases: dict[str, str]
    metadata: dict[str, Any]


def stored_names(name: str) -> tuple[str, str]:
    """Return the names in the file of a quantized weight's codes and scale."""
    return f"{name}.codes", f"{name}.scale"


def to_text(layout: Layout) -> str:
    """Return the description as canonical JSON.

    Raises:
        FormatError: metadata that JSON cannot hold.
    """
    quantized = {
        name: {
            "axis": entry.spec.axis,
            "bits": entry.spec.bits,
            "levels": entry.spec.levels,
            "shape": list(entry.shape),
        }
        for name, entry in layout.quantized.items()
    }
    tree = {"format_version": FORMAT_VERSION, "quantized": quantized}
    try:
        return strict_json.canonical(tree | {"aliases": layout.aliases, "metadata": layout.metadata})
    except (TypeError, ValueError) as error:
        raise FormatError(f"the metadata cannot be written as JSON: {error}") from error


def read_layout(path: Path) -> tuple[Header, Layout]:
    """Return the checked header and description of a file; nothing else of it is read.

    Raises:
        FormatError: as in `header.read_header` and `parse_layout`.
    """
    header = read_header(path)
    return header, parse_layout(path, header)


def parse_layout(path: Path, header: Header) -> Layout:
    """Return the description of a file, every statement checked against the tensors that the header lists.

    Raises:
        FormatError: not a packed model, an unknown version, or a description that does not fit the tensors.
    """
    if KEY not in header.metadata:
        raise FormatError(f"{path}: a safetensors file, but no packed model: its metadata have no key '{KEY}'")
    try:
        tree = strict_json.parse(header.metadata[KEY])
    except ValueError as error:
        raise FormatError(f"{path}: the metadata '{KEY}' are not valid JSON: {error}") from error
    _check_fields(path, tree)
    layout = Layout(
        {name: _entry(path, name, entry, tree["format_version"]) for name, entry in tree["quantized"].items()},
        tree["aliases"],
        tree["metadata"],
    )
    _check_tensors(path, layout, header.tensors)
    _check_aliases(path, layout, header.tensors)
    return layout


def rest_names(layout: Layout, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of the stored tensors that are neither codes nor scales."""
    taken = {stored for name in layout.quantized for stored in stored_names(name)}
    return [name for name in tensors if name not in taken]


def _check_fields(path: Path, tree: Any) -> None:
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if not is_count(version):
        raise FormatError(f"{path}: the metadata '{KEY}' should state a format_version, found {str(version)[:40]!r}")
    if version not in READABLE:
        raise FormatError(f"{path}: format version {version}; this qtdog reads up to {FORMAT_VERSION}: update qtdog")
    if set(tree) != FIELDS:
        raise FormatError(f"{path}: the metadata should have {sorted(FIELDS)}, found {str(sorted(tree))[:200]}")
    for field in FIELDS - {"format_version"}:
        if not isinstance(tree[field], dict):
            raise FormatError(f"{path}: '{field}' should be an object, found {type(tree[field]).__name__}")


def _entry(path: Path, name: str, entry: Any, version: int) -> Entry:
    fields = {"axis", "bits", "shape"} | ({"levels"} if version > 1 else set())
    if not isinstance(entry, dict) or set(entry) != fields:
        raise FormatError(f"{path}: weight '{name}' should state {', '.join(sorted(fields))}, found {str(entry)[:80]}")
    axis, bits, shape, levels = entry["axis"], entry["bits"], entry["shape"], entry.get("levels", "uniform")
    if levels not in LEVELS:
        raise FormatError(f"{path}: weight '{name}' should have levels {' or '.join(LEVELS)}, found {str(levels)[:40]}")
    if not is_count(bits) or not MIN_BITS <= bits <= MAX_BITS:
        raise FormatError(f"{path}: weight '{name}' should have {MIN_BITS} to {MAX_BITS} bits, found {str(bits)[:40]}")
    if not is_shape(shape) or 0 in shape:
        raise FormatError(f"{path}: weight '{name}' has the impossible shape {str(shape)[:80]}")
    if axis is not None and not (is_count(axis) and axis < len(shape)):
        raise FormatError(f"{path}: weight '{name}' of shape {shape} cannot have step sizes along {str(axis)[:40]}")
    return Entry(QuantSpec(bits, axis, levels), tuple(shape))


def _check_tensors(path: Path, layout: Layout, tensors: Mapping[str, TensorInfo]) -> None:
    for name, entry in layout.quantized.items():
        if name in tensors:
            raise FormatError(f"{path}: weight '{name}' is there twice, as codes and as floats")
        for stored, expected in zip(stored_names(name), entry.stored, strict=True):
            if tensors.get(stored) != expected:
                raise FormatError(f"{path}: expected '{stored}' as {expected}, found {tensors.get(stored, 'nothing')}")


def _check_aliases(path: Path, layout: Layout, tensors: Mapping[str, TensorInfo]) -> None:
    stored = {*rest_names(layout, tensors), *layout.quantized}
    for alias, name in layout.aliases.items():
        if not isinstance(name, str) or name not in stored or alias in stored:
            found = str(name)[:80]
            raise FormatError(f"{path}: '{alias}' should be a further name of a stored tensor, found '{found}'")
