"""Read the description and the pools of a packed file, every statement checked before memory is taken for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtdog.core.errors import FormatError
from qtdog.core.quantized import LEVELS, MAX_BITS, MIN_BITS, QuantSpec
from qtdog.packing import layout as strict_json
from qtdog.packing.codecs import BITS, CODECS, compress, content_bytes, decompress, may_expand, packed_bytes
from qtdog.packing.layout import (
    CODED_VERSION,
    DESCRIPTION,
    DTYPE_BYTES,
    KEY,
    MAX_TENSORS,
    READABLE,
    TORCH_DTYPES,
    Entry,
    Header,
    Layout,
    TensorInfo,
    is_count,
    is_shape,
    may_describe,
    pool_name,
    pooled,
    read_header,
    stored_names,
)

PLAIN, PLANES_ZSTD = POOL_CODECS = ("plain", "planes+zstd")
THOROUGH_LEVEL, FAST_LEVEL = 19, 1
THOROUGH_BYTES = 8 * 2**20  # what the thorough level does in a few seconds


def encode_pool(dtype: str, values: Sequence[Tensor]) -> tuple[str, Tensor]:
    """Return the name of the smaller codec for the values of these tensors, and the stream.

    The values are taken tensor after tensor, row-major and little-endian. `planes+zstd` has the first byte of every
    value, then the second of every value, and so on: the bytes with sign and exponent are alike among the weights of a
    network, and compress; those of the mantissa do not.

    Args:
        dtype: their type, as safetensors spells it.
        values: all of that type.

    Returns:
        A name of `POOL_CODECS`; uint8, shape (n,).

    Example:
        >>> codec, stream = encode_pool("F32", [torch.arange(1000) / 7, torch.zeros(24)])
        >>> codec, len(stream) < 4 * 1024
        ('planes+zstd', True)
    """
    flat = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in values]
    plain = torch.cat(flat)
    planes = plain.reshape(-1, DTYPE_BYTES[dtype]).T.contiguous().numpy().tobytes()
    frame = compress(planes, THOROUGH_LEVEL if len(planes) <= THOROUGH_BYTES else FAST_LEVEL)
    if len(frame) < len(planes) and may_expand(len(planes), len(frame)):
        return PLANES_ZSTD, torch.from_numpy(np.frombuffer(frame, dtype=np.uint8).copy())
    return PLAIN, plain


def decode_pool(dtype: str, stream: Tensor, codec: str, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return the tensors of a stream made by `encode_pool`.

    Args:
        dtype: their type, as safetensors spells it.
        stream: uint8, shape (n,).
        codec: a name of `POOL_CODECS`.
        shapes: of the tensors, in the order in which they were given.

    Raises:
        ValueError: the stream does not hold that many values.
    """
    sizes = [math.prod(shape) for shape in shapes]
    n_bytes = DTYPE_BYTES[dtype] * sum(sizes)
    if codec == PLANES_ZSTD:
        content = np.frombuffer(decompress(stream.numpy().tobytes(), n_bytes), dtype=np.uint8)
        stream = torch.from_numpy(content.reshape(DTYPE_BYTES[dtype], -1).T.copy()).reshape(-1)
    if len(stream) != n_bytes:
        raise ValueError(f"{n_bytes} bytes of values expected, found {len(stream)}")
    parts = stream.view(TORCH_DTYPES[dtype]).split(sizes)
    return [part.clone().reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


PLAIN_FIELDS = {"format_version", "quantized", "aliases", "metadata"}
CODED_FIELDS = PLAIN_FIELDS | {"rest", "pools"}


def read_layout(path: Path) -> tuple[Header, Layout]:
    """Return the checked header and description of a file; nothing else of it is read.

    Raises:
        FormatError: as in `header.read_header`; or not a packed model, an unknown version, a description that does not
            fit the tensors, or streams that claim to expand more than 64 times.
    """
    header = read_header(path)
    if KEY not in header.metadata:
        raise FormatError(f"{path}: a safetensors file, but no packed model: its metadata have no key '{KEY}'")
    tree = _tree(path, header.metadata[KEY], f"the metadata '{KEY}'")
    if _version(path, tree) == CODED_VERSION:
        layout = _coded_layout(path, header, tree)
    else:
        layout = _plain_layout(path, header, tree)
    n_names = len(layout.quantized) + len(layout.rest) + len(layout.aliases)
    if n_names > MAX_TENSORS:
        raise FormatError(f"{path}: {n_names:,} tensors, and {MAX_TENSORS:,} are the limit. The file is damaged")
    _check_aliases(path, layout)
    return header, layout


def _tree(path: Path, text: str, where: str) -> Any:
    try:
        return strict_json.parse(text)
    except ValueError as error:
        raise FormatError(f"{path}: {where} should be JSON: {error}") from error


def _version(path: Path, tree: Any) -> int:
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if not is_count(version):
        raise FormatError(f"{path}: the metadata '{KEY}' should state a format_version, found {str(version)[:40]!r}")
    if version not in READABLE:
        raise FormatError(f"{path}: format version {version}; this qtdog reads up to {READABLE[-1]}: update qtdog")
    return version


def _check_fields(path: Path, tree: Any, fields: set[str]) -> None:
    if not isinstance(tree, dict) or set(tree) != fields:
        found = str(sorted(tree))[:200] if isinstance(tree, dict) else type(tree).__name__
        raise FormatError(f"{path}: the description should have {sorted(fields)}, found {found}")
    for field in fields - {"format_version"}:
        if not isinstance(tree[field], dict):
            raise FormatError(f"{path}: '{field}' should be an object, found {type(tree[field]).__name__}")


def _plain_layout(path: Path, header: Header, tree: Any) -> Layout:
    _check_fields(path, tree, PLAIN_FIELDS)
    with_levels = tree["format_version"] > 1
    fields = {"axis", "bits", "shape"} | ({"levels"} if with_levels else set())
    quantized = {name: _entry(path, name, entry, fields) for name, entry in tree["quantized"].items()}
    taken: set[str] = set()
    for name, entry in quantized.items():
        codes_name, scale_name = stored_names(name)
        if name in header.tensors:
            raise FormatError(f"{path}: weight '{name}' is there twice, as codes and as floats")
        codes = TensorInfo("U8", (packed_bytes(entry.n_codes, entry.spec.bits),))
        _check_stored(path, header, {codes_name: codes, scale_name: entry.scale})
        taken |= {codes_name, scale_name}
    rest = {name: info for name, info in header.tensors.items() if name not in taken}
    return Layout(quantized, rest, tree["aliases"], tree["metadata"], {})


def _check_stored(path: Path, header: Header, expected: Mapping[str, TensorInfo]) -> None:
    for name, info in expected.items():
        if header.tensors.get(name) != info:
            raise FormatError(f"{path}: expected '{name}' as {info}, found {header.tensors.get(name, 'nothing')}")


def _coded_layout(path: Path, header: Header, statement: Mapping[str, Any]) -> Layout:
    if set(statement) != {"format_version"}:
        raise FormatError(f"{path}: the metadata '{KEY}' of version {CODED_VERSION} should state that and no more")
    tree = _tree(path, _described(path, header), f"the tensor '{DESCRIPTION}'")
    _check_fields(path, tree, CODED_FIELDS)
    if tree["format_version"] != CODED_VERSION:
        found = str(tree["format_version"])[:40]
        raise FormatError(f"{path}: the description should be of version {CODED_VERSION} like the file, found {found}")
    fields = {"axis", "bits", "levels", "shape", "codec"}
    quantized = {name: _entry(path, name, entry, fields) for name, entry in tree["quantized"].items()}
    rest = {name: _info(path, name, info) for name, info in tree["rest"].items()}
    twice = sorted(quantized.keys() & rest.keys())
    if twice:
        raise FormatError(f"{path}: weight '{twice[0]}' is there twice, as codes and as floats")
    layout = Layout(quantized, rest, tree["aliases"], tree["metadata"], tree["pools"])
    _check_streams(path, header, layout)
    return layout


def _described(path: Path, header: Header) -> str:
    _check_bytes(path, header, DESCRIPTION)
    try:
        with safe_open(path, "pt") as stream:
            frame = stream.get_tensor(DESCRIPTION).numpy().tobytes()
        n_bytes = content_bytes(frame)
        if not may_describe(n_bytes, len(frame)):
            raise ValueError(f"it claims {n_bytes} bytes from {len(frame)}, which is beyond the limit")
        return decompress(frame, n_bytes).decode()
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path}: the tensor '{DESCRIPTION}' cannot be read: {error}. Get the file again") from error


def _check_bytes(path: Path, header: Header, name: str) -> int:
    info = header.tensors.get(name)
    if info is None or info.dtype != "U8" or len(info.shape) != 1:
        raise FormatError(f"{path}: expected '{name}' as a row of bytes, found {info or 'nothing'}")
    return info.n_bytes


def _check_streams(path: Path, header: Header, layout: Layout) -> None:
    """Check that the file has the streams that the description calls for, and none that expands beyond measure."""
    expected = {DESCRIPTION}
    for name, entry in layout.quantized.items():
        expected.add(stored := stored_names(name)[0])
        n_packed = packed_bytes(entry.n_codes, entry.spec.bits)
        wanted = n_packed if entry.codec == BITS else None
        _check_size(path, stored, entry.n_codes, (_check_bytes(path, header, stored), wanted))
    pools = pooled({name: entry.scale for name, entry in layout.quantized.items()}, layout.rest)
    if set(pools) != set(layout.pools):
        raise FormatError(f"{path}: values of {sorted(pools)} need pools, found {str(sorted(layout.pools))[:80]}")
    for dtype, codec in layout.pools.items():
        expected.add(stored := pool_name(dtype))
        if codec not in POOL_CODECS:
            raise FormatError(f"{path}: '{stored}' should be {' or '.join(POOL_CODECS)}, found {str(codec)[:40]}")
        n_values = sum(info.n_bytes for info in pools[dtype])
        wanted = n_values if codec == PLAIN else None
        _check_size(path, stored, n_values, (_check_bytes(path, header, stored), wanted))
    extra = sorted(header.tensors.keys() - expected)
    if extra:
        raise FormatError(f"{path}: '{extra[0][:80]}' is not in the description")


def _check_size(path: Path, name: str, n_bytes: int, found_wanted: tuple[int, int | None]) -> None:
    found, wanted = found_wanted
    if wanted is not None and found != wanted:
        raise FormatError(f"{path}: '{name}' should take {wanted} bytes, found {found}")
    if wanted is None and not may_expand(n_bytes, found):
        raise FormatError(f"{path}: '{name}' claims {n_bytes} bytes from {found}: more than 64 times, so it is refused")


def _entry(path: Path, name: str, entry: Any, fields: set[str]) -> Entry:
    optional = {"groups"} if "codec" in fields else set()
    if not isinstance(entry, dict) or set(entry) - optional != fields:
        raise FormatError(f"{path}: weight '{name}' should state {', '.join(sorted(fields))}, found {str(entry)[:80]}")
    axis, bits, shape, levels = entry["axis"], entry["bits"], entry["shape"], entry.get("levels", "uniform")
    codec = entry.get("codec", BITS)
    for what, value, known in (("levels", levels, LEVELS), ("codec", codec, CODECS)):
        if value not in known:
            found = str(value)[:40]
            raise FormatError(f"{path}: weight '{name}' should have {what} {' or '.join(known)}, found {found}")
    if not is_count(bits) or not MIN_BITS <= bits <= MAX_BITS:
        raise FormatError(f"{path}: weight '{name}' should have {MIN_BITS} to {MAX_BITS} bits, found {str(bits)[:40]}")
    if not is_shape(shape) or 0 in shape:
        raise FormatError(f"{path}: weight '{name}' has the impossible shape {str(shape)[:80]}")
    if axis is not None and not (is_count(axis) and axis < len(shape)):
        raise FormatError(f"{path}: weight '{name}' of shape {shape} cannot have step sizes along {str(axis)[:40]}")
    groups = entry.get("groups", 1)
    if "groups" in entry and not (is_count(groups) and groups > 1 and axis and shape[0] % groups == 0):
        found = str(groups)[:40]
        raise FormatError(f"{path}: weight '{name}' of shape {shape} cannot have groups {found} along axis {axis}")
    return Entry(QuantSpec(bits, axis, levels, groups), tuple(shape), codec)


def _info(path: Path, name: str, info: Any) -> TensorInfo:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape"}:
        raise FormatError(f"{path}: tensor '{name}' should state dtype and shape, found {str(info)[:80]}")
    dtype, shape = info["dtype"], info["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES or not is_shape(shape):
        raise FormatError(f"{path}: tensor '{name}' is impossible: {str(info)[:120]}")
    return TensorInfo(dtype, tuple(shape))


def _check_aliases(path: Path, layout: Layout) -> None:
    stored = {*layout.rest, *layout.quantized}
    for alias, name in layout.aliases.items():
        if not isinstance(name, str) or name not in stored or alias in stored:
            found = str(name)[:80]
            raise FormatError(f"{path}: '{alias}' should be a further name of a stored tensor, found '{found}'")
