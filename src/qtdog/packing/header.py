"""The safetensors header of a file, checked before anything else of the file is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtdog.core.errors import FormatError
from qtdog.packing import strict_json

MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMS = 16
MAX_VALUES = 2**40
# In the order in which safetensors ranks them.
DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
DTYPE_BYTES |= {"F64": 8, "I64": 8, "U64": 8}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors of a file by name, and its metadata strings."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file whose structure is sound.

    Sound means: the header's length fits the file and is at most 16 MiB; it is strict JSON; every tensor has a known
    type, at most 16 dimensions and 2^40 values; the tensors' data fill the rest of the file without gap or overlap.

    Raises:
        FormatError: anything else, with the path, what was expected and what was found.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            _require(path, size >= 8 and length <= min(size - 8, MAX_HEADER_BYTES), _length_problem(size, length))
            raw = stream.read(length)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}. Give the path of a model file") from error
    return _parse(path, raw, size - 8 - length)


def _length_problem(size: int, length: int) -> str:
    if size < 8:
        return f"a safetensors file has at least 8 bytes, this one {size}"
    return f"the header claims {length} bytes; the file has {size - 8} left, and the limit is {MAX_HEADER_BYTES}"


def _require(path: Path, condition: bool, problem: str) -> None:
    if not condition:
        raise FormatError(f"{path}: {problem}. The file is truncated, damaged or no model file; get it again")


def _parse(path: Path, raw: bytes, data_bytes: int) -> Header:
    try:
        tree = strict_json.parse(raw.decode())
    except ValueError as error:
        raise FormatError(f"{path}: the header is not JSON as safetensors has it: {error}") from error
    _require(path, isinstance(tree, dict), f"the header should be a JSON object, found {type(tree).__name__}")
    metadata = tree.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    _require(path, strings, "'__metadata__' should map names to strings")
    spans = {name: _span(path, name, entry) for name, entry in tree.items()}
    end = 0
    for name, (begin, stop, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        _require(path, begin == end, f"the data of '{name}' should begin at {end}, the header says {begin}")
        end = stop
    _require(path, end == data_bytes, f"the tensors should take {end} bytes after the header, found {data_bytes}")
    return Header({name: info for name, (_, _, info) in spans.items()}, metadata)


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    keys = {"dtype", "shape", "data_offsets"}
    _require(path, isinstance(entry, dict) and set(entry) == keys, f"tensor '{name}' should have {sorted(keys)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(dtype, str) and dtype in DTYPE_BYTES
    _require(path, known, f"tensor '{name}' has type {str(dtype)[:40]!r}; known are {', '.join(DTYPE_BYTES)}")
    _require(path, is_shape(shape), f"tensor '{name}' has the impossible shape {str(shape)[:80]}")
    numbers = isinstance(offsets, list) and len(offsets) == 2 and all(is_count(value) for value in offsets)
    _require(path, numbers, f"tensor '{name}' should have two offsets, found {str(offsets)[:80]}")
    info = TensorInfo(dtype, tuple(shape))
    begin, stop = offsets
    _require(
        path,
        stop - begin == info.n_bytes,
        f"tensor '{name}' of shape {shape} and type {dtype} takes {info.n_bytes} bytes, its offsets say {stop - begin}",
    )
    return begin, stop, info


def is_count(value: object) -> bool:
    """Return whether `value` is a whole number from 0 to 2^63 - 1 (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_shape(value: object) -> bool:
    """Return whether `value` is a list of at most 16 counts with a product of at most 2^40.

    Example:
        >>> is_shape([3, 0]), is_shape([-1]), is_shape([2**40, 2])
        (True, False, False)
    """
    if not isinstance(value, list) or len(value) > MAX_DIMS or not all(is_count(dim) for dim in value):
        return False
    return math.prod(max(dim, 1) for dim in value) <= MAX_VALUES
