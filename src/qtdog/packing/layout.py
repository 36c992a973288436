"""The description inside a packed file: which tensors are codes, on which grid, stored how, under which names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtdog.core.errors import FormatError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.core.safe_text import check_json_extent
from qtdog.packing.codecs import BITS


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


MAX_JSON_ITEMS = 2**20


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: no JSON, a key twice in one object, NaN or infinity, half a character (a lone surrogate, which no
            file or terminal can be given), nesting deeper than 64, or more than 2^20 items: what a parsed text takes
            depends on their number, not on its length.

    Example:
        >>> parse('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' appears twice
    """
    check_json_extent(text, max_items=MAX_JSON_ITEMS)
    try:
        tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _require_whole_characters(text, tree)
    return tree


def _require_whole_characters(text: str, tree: Any) -> None:
    """Raise ValueError if a string of a JSON tree, whose ASCII text is given, has a lone surrogate."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it has half a character") from None


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


MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 2**17
"""Names in one file, those of tied weights included: a tensor takes some 500 bytes, however empty it is."""
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
        tree = parse(raw.decode())
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


Value = QuantizedTensor | Tensor


def find_aliases(values: Mapping[str, Value]) -> dict[str, str]:
    """Return every further name of a value, with the name (the first in spelling) under which it is stored.

    Two names mean one value if they mean one quantized tensor object, or tensors that view the same memory alike.

    Example:
        >>> import torch
        >>> weight = torch.ones(2)
        >>> find_aliases({"head": weight, "embedding": weight, "bias": torch.ones(2)})
        {'head': 'embedding'}
    """
    first: dict[Hashable, str] = {}
    owners = {name: first.setdefault(_identity(values[name]), name) for name in sorted(values)}
    return {name: owner for name, owner in owners.items() if name != owner}


def _identity(value: Value) -> Hashable:
    if isinstance(value, QuantizedTensor) or value.numel() == 0:
        return id(value)
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device


PLAIN_VERSION = 2  # every tensor plain, codes bit-packed; float models are written so
CODED_VERSION = 3  # codes and values entropy-coded
READABLE = (1, 2, 3)  # version 1 had no levels: all its grids are uniform
KEY = "qtdog"
DESCRIPTION = "description"


@dataclass(frozen=True)
class Entry:
    """The grid and the shape of one quantized weight, and how its codes are stored."""

    spec: QuantSpec
    shape: tuple[int, ...]
    codec: str = BITS

    @property
    def n_codes(self) -> int:
        """Codes of the weight."""
        return math.prod(self.shape)

    @cached_property
    def scale(self) -> TensorInfo:
        """Its step sizes: one, or one per index of the axis (in each group)."""
        return TensorInfo("F32", (self.spec.n_scales(self.shape),))


@dataclass(frozen=True)
class Layout:
    """The whole description.

    Attributes:
        quantized: weight name to its grid, shape and codec.
        rest: type and shape of every other tensor that is stored.
        aliases: further names of stored tensors (tied weights), each with the name it is stored under.
        metadata: the caller's.
        pools: how the values of each type are stored that lie together; empty where every tensor lies by itself.
    """

    quantized: dict[str, Entry]
    rest: dict[str, TensorInfo]
    aliases: dict[str, str]
    metadata: dict[str, Any]
    pools: dict[str, str]


def may_describe(n_bytes: int, n_stored: int) -> bool:
    """Return whether a description of `n_bytes` may lie in a frame of `n_stored`: parsed it takes 20 times its length.

    Example:
        >>> may_describe(2**20, 100), may_describe(2**21, 100), may_describe(2**21, 2**13), may_describe(2**25, 2**24)
        (True, False, True, False)
    """
    return n_bytes <= min(MAX_HEADER_BYTES, max(2**20, 256 * n_stored))


def stored_names(name: str) -> tuple[str, str]:
    """Return the names in a file of a quantized weight's codes and, where every tensor lies by itself, its scale."""
    return f"{name}.codes", f"{name}.scale"


def pool_name(dtype: str) -> str:
    """Return the name in a file of all values of one type.

    Example:
        >>> pool_name("F32")
        'values.F32'
    """
    return f"values.{dtype}"


def pooled(quantized: Mapping[str, TensorInfo], rest: Mapping[str, TensorInfo]) -> dict[str, list[TensorInfo]]:
    """Return what lies in the pool of each type, in order: step sizes of the weights, then the rest, each by name.

    Args:
        quantized: the step sizes of each quantized weight.
        rest: every other tensor that is stored.

    Example:
        >>> pooled({}, {"b": TensorInfo("F32", (2,)), "a": TensorInfo("F32", (3,))})
        {'F32': [TensorInfo(dtype='F32', shape=(3,)), TensorInfo(dtype='F32', shape=(2,))]}
    """
    found: dict[str, list[TensorInfo]] = {}
    for info in [*_by_name(quantized), *_by_name(rest)]:
        found.setdefault(info.dtype, []).append(info)
    return found


def _by_name(infos: Mapping[str, TensorInfo]) -> Iterable[TensorInfo]:
    return (infos[name] for name in sorted(infos))


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
    grid = {"axis": spec.axis, "bits": spec.bits, "levels": spec.levels, "shape": list(entry.shape)}
    return grid | ({} if spec.groups == 1 else {"groups": spec.groups})


def _text(tree: dict[str, Any], layout: Layout) -> str:
    try:
        tree = tree | {"aliases": layout.aliases, "metadata": layout.metadata}
        text = canonical(tree)
        _require_whole_characters(text, tree)
        check_json_extent(text, max_items=MAX_JSON_ITEMS)
        return text
    except (TypeError, ValueError) as error:
        raise FormatError(f"the metadata cannot be written as JSON: {error}") from error


# By the names that safetensors gives them, whose order and sizes are `header.DTYPE_BYTES`.
TORCH_DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16}
TORCH_DTYPES |= {"F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32}
TORCH_DTYPES |= {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def check_scale(path: Path, name: str, scale: Tensor) -> None:
    """Refuse step sizes that are not positive and finite.

    Raises:
        FormatError: naming the file, the weight and the first bad value.
    """
    good = torch.isfinite(scale) & (scale > 0)
    if not good.all():
        found = scale[~good][0].item()
        raise FormatError(f"{path}: the step sizes of '{name}' should be positive and finite, found {found}")


def check_codes(path: Path, name: str, value: QuantizedTensor) -> None:
    """Refuse codes that are not on their grid.

    Raises:
        FormatError: naming the file, the weight, the range and what was found.
    """
    spec = value.spec
    low, high = (int(bound) for bound in value.codes.aminmax())
    if low < spec.qmin or high > spec.qmax:
        raise FormatError(
            f"{path}: the codes of '{name}' should lie in {spec.qmin} … {spec.qmax}, found {low} … {high}"
        )


def check_quantized(path: Path, name: str, value: QuantizedTensor) -> None:
    """Refuse a quantized weight that the format cannot hold.

    Raises:
        FormatError: codes of another type, empty or off their grid; step sizes of another type or number, or bad ones.
    """
    codes, scale, spec = value.codes, value.scale, value.spec
    n_scales = spec.n_scales(codes.shape)
    if codes.dtype != torch.int8 or not is_shape(list(codes.shape)) or not codes.numel():
        found = f"{codes.dtype} {tuple(codes.shape)}"
        raise FormatError(f"{path}: the codes of '{name}' should be int8 with at least one value, found {found}")
    if scale.dtype != torch.float32 or scale.shape != (n_scales,):
        found = f"{scale.dtype} {tuple(scale.shape)}"
        raise FormatError(f"{path}: the step sizes of '{name}' should be float32 ({n_scales},), found {found}")
    check_codes(path, name, value)
    check_scale(path, name, scale)


def check_rest(path: Path, name: str, value: Tensor) -> None:
    """Refuse a float tensor with NaN, truth values that are neither, or a type that the format does not know.

    Raises:
        FormatError: naming the file and the tensor.
    """
    if value.dtype not in DTYPE_NAMES or not is_shape(list(value.shape)):
        raise FormatError(f"{path}: '{name}' is {value.dtype} {tuple(value.shape)}, which the format cannot hold")
    if value.is_floating_point() and torch.isnan(value).any():
        raise FormatError(f"{path}: '{name}' holds NaN: the training diverged, or the file is damaged")
    if value.dtype == torch.bool and (value.contiguous().view(torch.uint8) > 1).any():
        raise FormatError(f"{path}: '{name}' should hold truth values, found bytes beyond 1: the file is damaged")
