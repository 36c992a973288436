"""Write and read the packed model file; `docs/file-format.md` is its norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtdog.core.errors import FormatError
from qtdog.core.files import write_atomic
from qtdog.core.quantized import QuantizedTensor
from qtdog.packing.bits import pack_codes, unpack_codes
from qtdog.packing.contents import check_codes, check_quantized, check_rest, check_scale
from qtdog.packing.header import MAX_HEADER_BYTES, Header
from qtdog.packing.layout import KEY, Entry, Layout, read_layout, rest_names, stored_names, to_text
from qtdog.packing.ties import find_aliases


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
    """Write a packed model file; the same input gives the same bytes.

    A tensor that has several names is stored once. With no `quantized` this writes the float32 file that sizes are
    compared with.

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
    aliases = find_aliases({**quantized, **rest})
    kept = {name: value for name, value in sorted(quantized.items()) if name not in aliases}
    tensors = _packed(path, kept)
    plain = {name: value for name, value in rest.items() if name not in aliases}
    clash = sorted(plain.keys() & (tensors.keys() | quantized.keys() | {"__metadata__"}))
    if clash:
        raise FormatError(f"{path}: '{clash[0]}' would be stored twice; rename that tensor of the model")
    for name, value in plain.items():
        check_rest(path, name, value)
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    entries = {name: Entry(value.spec, tuple(value.codes.shape)) for name, value in kept.items()}
    content = safetensors.torch.save(tensors, {KEY: to_text(Layout(entries, aliases, dict(metadata)))})
    if int.from_bytes(content[:8], "little") > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: names and metadata may take {MAX_HEADER_BYTES} bytes; make the metadata smaller")
    write_atomic(path, content)


def _packed(path: Path, quantized: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in quantized.items():
        check_quantized(path, name, value)
        codes_name, scale_name = stored_names(name)
        if codes_name in quantized or scale_name in quantized or {codes_name, scale_name} & tensors.keys():
            raise FormatError(f"{path}: '{name}' and another weight would be stored under one name; rename one")
        tensors[codes_name] = pack_codes(value.codes, value.spec.bits)
        tensors[scale_name] = value.scale.detach().cpu().clone()
    return tensors


def load_packed(path: Path | str) -> PackedModel:
    """Return the content of a packed model file.

    Everything that the header states is checked, against itself and against the size of the file, before memory is
    taken for the tensors; codes then take one byte each, at most 4 per byte of the file.

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
    return read_contents(path, *read_layout(path))


def read_contents(path: Path, header: Header, layout: Layout) -> PackedModel:
    """Return what the tensors of a file hold, its description being checked already (`layout.read_layout`).

    Raises:
        FormatError: safetensors cannot read it, or a tensor holds something that the format does not allow.
    """
    try:
        with safe_open(path, "pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in header.tensors}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: safetensors cannot read it: {error}. Get the file again") from error
    quantized = {name: _unpacked(path, name, entry, tensors) for name, entry in layout.quantized.items()}
    rest = {name: tensors[name] for name in rest_names(layout, header.tensors)}
    for name, value in rest.items():
        check_rest(path, name, value)
    quantized |= {alias: quantized[name] for alias, name in layout.aliases.items() if name in quantized}
    rest |= {alias: rest[name] for alias, name in layout.aliases.items() if name in rest}
    return PackedModel(quantized, rest, layout.metadata)


def _unpacked(path: Path, name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    codes_name, scale_name = stored_names(name)
    check_scale(path, name, tensors[scale_name])
    try:
        codes = unpack_codes(tensors[codes_name], entry.spec.bits, entry.n_codes)
    except ValueError as error:
        raise FormatError(f"{path}: '{codes_name}' is no stream of codes: {error}") from error
    value = QuantizedTensor(codes.reshape(entry.shape), tensors[scale_name], entry.spec)
    check_codes(path, name, value)
    return value
