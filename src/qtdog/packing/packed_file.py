"""Write and read the packed model file; `docs/file-format.md` is its norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtdog.core.errors import FormatError
from qtdog.core.files import write_atomic
from qtdog.core.quantized import QuantizedTensor
from qtdog.packing import layout as strict_json
from qtdog.packing.codecs import compress, decode_codes, encode_codes
from qtdog.packing.layout import (
    CODED_VERSION,
    DESCRIPTION,
    DTYPE_NAMES,
    KEY,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Entry,
    Layout,
    TensorInfo,
    check_codes,
    check_quantized,
    check_rest,
    check_scale,
    coded_text,
    find_aliases,
    may_describe,
    plain_text,
    pool_name,
    pooled,
    stored_names,
)
from qtdog.packing.reader import THOROUGH_LEVEL, decode_pool, encode_pool, read_layout


@dataclass(frozen=True)
class PackedModel:
    """What a packed file holds, under the names of the plain model's state dict; tied names share one object.

    Attributes:
        quantized: codes and step sizes.
        rest: every other tensor.
        metadata: the caller's.
    """

    quantized: dict[str, QuantizedTensor]
    rest: dict[str, Tensor]
    metadata: dict[str, Any]


def save_packed(
    path: Path | str, quantized: Mapping[str, QuantizedTensor], rest: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a packed model file; the same input (and the same zstd library) gives the same bytes.

    A tensor that has several names is stored once. With no `quantized` every tensor is written plain: that is the
    float32 file that sizes are compared with.

    Args:
        path: where to; an existing file is replaced in one step.
        quantized: codes and step sizes by weight name.
        rest: every other tensor of the plain state dict.
        metadata: anything JSON can hold.

    Raises:
        FormatError: names that collide, codes off their grid, a step size that is not positive and finite, a NaN in
            the rest, a type that the format does not know, or metadata that JSON cannot hold.
        RunError: the disk is full or not writable; the old file is intact.
    """
    path = Path(path)
    clash = sorted(quantized.keys() & rest.keys())
    if clash:
        raise FormatError(f"{path}: '{clash[0]}' would be stored twice; rename that tensor of the model")
    if len(quantized) + len(rest) > MAX_TENSORS:
        raise FormatError(f"{path}: {len(quantized) + len(rest):,} tensors, and a file holds {MAX_TENSORS:,}")
    aliases = find_aliases({**quantized, **rest})
    model = PackedModel(
        {name: value for name, value in sorted(quantized.items()) if name not in aliases},
        {name: value for name, value in sorted(rest.items()) if name not in aliases},
        dict(metadata),
    )
    for name, value in model.quantized.items():
        check_quantized(path, name, value)
    for name, value in model.rest.items():
        check_rest(path, name, value)
    write_atomic(path, _coded(path, model, aliases) if model.quantized else _plain(path, model, aliases))


def _plain(path: Path, model: PackedModel, aliases: dict[str, str]) -> bytes:
    if "__metadata__" in model.rest:
        raise FormatError(f"{path}: no tensor can be called '__metadata__'; rename that tensor of the model")
    tensors = {name: _on_cpu(value) for name, value in model.rest.items()}
    text = plain_text(Layout({}, {}, aliases, model.metadata, {}))
    content = safetensors.torch.save(tensors, {KEY: text})
    _check_length(path, int.from_bytes(content[:8], "little"))
    return content


def _coded(path: Path, model: PackedModel, aliases: dict[str, str]) -> bytes:
    entries: dict[str, Entry] = {}
    streams: dict[str, Tensor] = {}
    for name, value in model.quantized.items():
        codec, streams[stored_names(name)[0]] = encode_codes(value.codes, value.spec.bits)
        entries[name] = Entry(value.spec, tuple(value.codes.shape), codec)
    values: dict[str, list[Tensor]] = {}
    for value in [*(value.scale for value in model.quantized.values()), *model.rest.values()]:
        values.setdefault(DTYPE_NAMES[value.dtype], []).append(value)
    pools: dict[str, str] = {}
    for dtype, tensors in values.items():
        pools[dtype], streams[pool_name(dtype)] = encode_pool(dtype, tensors)
    rest = {name: TensorInfo(DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in model.rest.items()}
    text = coded_text(Layout(entries, rest, aliases, model.metadata, pools)).encode()
    frame = compress(text, THOROUGH_LEVEL)
    if not may_describe(len(text), len(frame)):
        raise FormatError(f"{path}: names and metadata take {len(text)} bytes; make the metadata smaller")
    streams[DESCRIPTION] = torch.from_numpy(np.frombuffer(frame, dtype=np.uint8).copy())
    content = safetensors.torch.save(streams, {KEY: strict_json.canonical({"format_version": CODED_VERSION})})
    _check_length(path, int.from_bytes(content[:8], "little"))
    return content


def _check_length(path: Path, n_bytes: int) -> None:
    if n_bytes > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: names and metadata may take {MAX_HEADER_BYTES} bytes; make the metadata smaller")


def _on_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def load_packed(path: Path | str) -> PackedModel:
    """Return the content of a packed model file.

    Everything that the header states is checked, against itself and against the size of the file, before memory is
    taken for the tensors; decoded they take at most 64 bytes per byte of the file.

    Raises:
        FormatError: the file cannot be read, is truncated or damaged, is of another kind or version, or holds something
            that the format does not allow; the text says what was expected and what was found.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_packed(path, {}, {"bias": torch.zeros(2)}, {"classes": ["cat", "dog"]})
        >>> load_packed(path).metadata
        {'classes': ['cat', 'dog']}
    """
    path = Path(path)
    return read_contents(path, read_layout(path)[1])


def read_contents(path: Path, layout: Layout) -> PackedModel:
    """Return what the tensors of a file hold, its description being checked already (`read_layout.read_layout`).

    They are read and decoded one after another.

    Raises:
        FormatError: safetensors cannot read it, or a tensor holds something that the format does not allow.
    """
    try:
        with safe_open(path, "pt") as stream:
            scales, rest = _values(path, layout, stream.get_tensor)
            quantized = {
                name: _quantized(path, name, entry, scales[name], stream.get_tensor)
                for name, entry in layout.quantized.items()
            }
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: safetensors cannot read it: {error}. Get the file again") from error
    for name, value in rest.items():
        check_rest(path, name, value)
    quantized |= {alias: quantized[name] for alias, name in layout.aliases.items() if name in quantized}
    rest |= {alias: rest[name] for alias, name in layout.aliases.items() if name in rest}
    return PackedModel(quantized, rest, layout.metadata)


def _values(path: Path, layout: Layout, read: Callable[[str], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the step sizes of each weight and every other tensor."""
    if not layout.pools:
        scales = {name: read(stored_names(name)[1]) for name in layout.quantized}
        return scales, {name: read(name) for name in layout.rest}
    found: dict[str, Iterator[Tensor]] = {}
    scale_infos = {name: entry.scale for name, entry in layout.quantized.items()}
    for dtype, infos in pooled(scale_infos, layout.rest).items():
        stored = pool_name(dtype)
        try:
            found[dtype] = iter(decode_pool(dtype, read(stored), layout.pools[dtype], [info.shape for info in infos]))
        except ValueError as error:
            raise FormatError(f"{path}: '{stored}' is no stream of values: {error}") from error
    scales = {name: next(found["F32"]) for name in sorted(layout.quantized)}
    return scales, {name: next(found[layout.rest[name].dtype]) for name in sorted(layout.rest)}


def _quantized(path: Path, name: str, entry: Entry, scale: Tensor, read: Callable[[str], Tensor]) -> QuantizedTensor:
    stored = stored_names(name)[0]
    check_scale(path, name, scale)
    try:
        codes = decode_codes(read(stored), entry.codec, entry.spec.bits, entry.n_codes)
    except ValueError as error:
        raise FormatError(f"{path}: '{stored}' is no stream of codes: {error}") from error
    value = QuantizedTensor(codes.reshape(entry.shape), scale, entry.spec)
    check_codes(path, name, value)
    return value
