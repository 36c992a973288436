"""How large an ensemble file is, beside the file of one of its members in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtdog.packing.description import plain_text
from qtdog.packing.ensemble_layout import check_members, member_metadata, member_name
from qtdog.packing.entropy import code_entropy
from qtdog.packing.header import Header, TensorInfo
from qtdog.packing.layout import KEY, Layout, stored_names
from qtdog.packing.packed_file import read_contents
from qtdog.packing.read_layout import read_layout
from qtdog.packing.sizes import code_bytes, serialised_bytes, value_bytes


@dataclass(frozen=True)
class EnsembleSizes:
    """The size of an ensemble file.

    Attributes:
        bytes: of the file on disk: header, metadata and every member.
        float32_bytes: of ONE member with float32 weights, in a file of its own with its metadata.
        ratio: float32_bytes / bytes: below 1 where the ensemble is larger than one float model.
        float32_models: bytes / float32_bytes: how many float models take that much.
        n_members: members in the file.
        shared_bytes: what the further members share instead of storing it again: coded weights, plain values.
        bits_per_code, entropy_bits_per_code, entropy_bytes, over_entropy: as in `sizes.Sizes`, what is shared once.
    """

    bytes: int
    float32_bytes: int
    ratio: float
    float32_models: float
    n_members: int
    shared_bytes: int
    bits_per_code: float
    entropy_bits_per_code: float
    entropy_bytes: float
    over_entropy: float


def ensemble_sizes(path: Path | str) -> EnsembleSizes:
    """Return the sizes of an ensemble file; its codes are read.

    `float32_bytes` is exact: it is what `packed_file.save_packed` writes for member 0's dequantized weights.

    Raises:
        FormatError: no sound ensemble file.
    """
    path = Path(path)
    header, layout = read_layout(path)
    n_members = check_members(path, layout)
    entropy = code_entropy(read_contents(path, layout).quantized.values())
    n_bytes, one = path.stat().st_size, _float32_bytes(layout)
    bound = entropy.bytes + value_bytes(layout)
    return EnsembleSizes(
        bytes=n_bytes,
        float32_bytes=one,
        ratio=one / n_bytes,
        float32_models=n_bytes / one,
        n_members=n_members,
        shared_bytes=_shared_bytes(header, layout),
        bits_per_code=8 * code_bytes(header, layout) / max(entropy.n_codes, 1),
        entropy_bits_per_code=entropy.bits_per_code,
        entropy_bytes=bound,
        over_entropy=n_bytes / max(bound, 1),
    )


def _float32_bytes(layout: Layout) -> int:
    """Return the bytes of member 0 in float32; names that it ties are stored once, as in a file of its own."""
    prefix = member_name(0, "")
    stored: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for name in sorted(name for name in [*layout.quantized, *layout.rest, *layout.aliases] if name.startswith(prefix)):
        owner = layout.aliases.get(name, name)
        first = stored.setdefault(owner, name)
        if first != name:
            aliases[name.removeprefix(prefix)] = first.removeprefix(prefix)
    tensors = {name.removeprefix(prefix): _float32(layout, owner) for owner, name in stored.items()}
    text = plain_text(Layout({}, {}, aliases, member_metadata(layout.metadata)[0], {}))
    return serialised_bytes(tensors, {KEY: text})


def _float32(layout: Layout, owner: str) -> TensorInfo:
    entry = layout.quantized.get(owner)
    return layout.rest[owner] if entry is None else TensorInfo("F32", entry.shape)


def _shared_bytes(header: Header, layout: Layout) -> int:
    owners = [
        owner for alias, owner in layout.aliases.items() if alias.split(".", 2)[1] != owner.split(".", 2)[1]
    ]  # fmt: skip
    return sum(_stored_bytes(header, layout, owner) for owner in owners)


def _stored_bytes(header: Header, layout: Layout, owner: str) -> int:
    entry = layout.quantized.get(owner)
    if entry is None:
        return layout.rest[owner].n_bytes
    return header.tensors[stored_names(owner)[0]].n_bytes + entry.scale.n_bytes
