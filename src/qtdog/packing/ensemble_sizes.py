"""How large an ensemble file is, beside the file of one of its members in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtdog.packing.ensemble_layout import check_members, member_metadata, member_name
from qtdog.packing.header import Header, TensorInfo
from qtdog.packing.layout import KEY, Layout, read_layout, stored_names, to_text
from qtdog.packing.sizes import serialised_bytes


@dataclass(frozen=True)
class EnsembleSizes:
    """The size of an ensemble file.

    Attributes:
        bytes: of the file on disk: header, metadata and every member.
        float32_bytes: of ONE member with float32 weights, in a file of its own with its metadata.
        ratio: float32_bytes / bytes: below 1 where the ensemble is larger than one float model.
        float32_models: bytes / float32_bytes: how many float models take that much.
        n_members: members in the file.
        shared_bytes: bytes of the tensors that the further members share instead of storing them again.
    """

    bytes: int
    float32_bytes: int
    ratio: float
    float32_models: float
    n_members: int
    shared_bytes: int


def ensemble_sizes(path: Path | str) -> EnsembleSizes:
    """Return the sizes of an ensemble file; only its header is read.

    `float32_bytes` is exact: it is what `packed_file.save_packed` writes for member 0's dequantized weights.

    Raises:
        FormatError: no ensemble file.
    """
    path = Path(path)
    header, layout = read_layout(path)
    n_members = check_members(path, header, layout)
    n_bytes = path.stat().st_size
    one = _float32_bytes(header, layout)
    shared = sum(
        _stored_bytes(header, layout, owner)
        for alias, owner in layout.aliases.items()
        if alias.split(".", 2)[1] != owner.split(".", 2)[1]
    )
    return EnsembleSizes(n_bytes, one, one / n_bytes, n_bytes / one, n_members, shared)


def _float32_bytes(header: Header, layout: Layout) -> int:
    """Return the bytes of member 0 in float32; names that it ties are stored once, as in a file of its own."""
    prefix = member_name(0, "")
    names = [*layout.quantized, *header.tensors, *layout.aliases]
    stored: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for name in sorted({name for name in names if name.startswith(prefix)} - _parts(layout)):
        owner = layout.aliases.get(name, name)
        first = stored.setdefault(owner, name)
        if first != name:
            aliases[name.removeprefix(prefix)] = first.removeprefix(prefix)
    tensors = {name.removeprefix(prefix): _float32(header, layout, owner) for owner, name in stored.items()}
    text = to_text(Layout({}, aliases, member_metadata(layout.metadata)[0]))
    return serialised_bytes(tensors, {KEY: text})


def _parts(layout: Layout) -> set[str]:
    return {part for name in layout.quantized for part in stored_names(name)}


def _float32(header: Header, layout: Layout, owner: str) -> TensorInfo:
    entry = layout.quantized.get(owner)
    return header.tensors[owner] if entry is None else TensorInfo("F32", entry.shape)


def _stored_bytes(header: Header, layout: Layout, owner: str) -> int:
    entry = layout.quantized.get(owner)
    return header.tensors[owner].n_bytes if entry is None else sum(info.n_bytes for info in entry.stored)
