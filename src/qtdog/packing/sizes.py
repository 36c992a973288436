"""How large a model or ensemble file is, beside float32 and beside what the entropy of its codes allows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtdog.core.quantized import QuantizedTensor
from qtdog.packing.ensemble_file import check_members, member_metadata, member_name
from qtdog.packing.layout import DTYPE_BYTES, KEY, Header, Layout, TensorInfo, plain_text, stored_names
from qtdog.packing.packed_file import read_contents
from qtdog.packing.reader import read_layout


@dataclass(frozen=True)
class CodeEntropy:
    """What codes must cost.

    Attributes:
        n_codes: how many there are.
        bits_per_code: entropy of the codes, each tensor by its own frequencies, averaged over all codes; 0 without any.
    """

    n_codes: int
    bits_per_code: float

    @property
    def bytes(self) -> float:
        """Bytes of all codes at that price."""
        return self.n_codes * self.bits_per_code / 8


def entropy_bits(codes: Tensor) -> float:
    """Return the empirical entropy of integer codes in bits per code, -Σ p log2 p over their frequencies p.

    Source: Shannon, *A Mathematical Theory of Communication*, 1948, theorem 9: codes that are drawn independently
    cannot be stored in less. Codes of a Gaussian weight with a standard deviation of σ steps have log2(σ sqrt(2πe)).

    Args:
        codes: int8, any shape, at least one.

    Example:
        >>> entropy_bits(torch.tensor([1, 1, -1, 0], dtype=torch.int8))
        1.5
    """
    from scipy.special import entr  # takes 0.4 s, which training should not wait for

    counts = torch.bincount(codes.reshape(-1).int() + 128).numpy()
    return float(entr(counts / counts.sum()).sum() / math.log(2))


def code_entropy(weights: Iterable[QuantizedTensor]) -> CodeEntropy:
    """Return the entropy of the codes of several weights, one under several names counted once.

    Example:
        >>> from qtdog.core.quantized import QuantSpec
        >>> codes = torch.tensor([[1, 1, -1, 0]], dtype=torch.int8)
        >>> code_entropy([QuantizedTensor(codes, torch.ones(1), QuantSpec(2))])
        CodeEntropy(n_codes=4, bits_per_code=1.5)
    """
    once = {id(weight): weight for weight in weights}.values()
    n_codes = sum(weight.codes.numel() for weight in once)
    n_bits = math.fsum(weight.codes.numel() * entropy_bits(weight.codes) for weight in once)
    return CodeEntropy(n_codes, n_bits / n_codes if n_codes else 0.0)


FLOATS = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True)
class Sizes:
    """The size of a packed model file.

    Attributes:
        bytes: of the file on disk: header, codes, step sizes, float rest and metadata.
        float32_bytes: of the same model with float32 weights, in the same kind of file with the same metadata.
        ratio: float32_bytes / bytes.
        bits_per_weight: bits of the file per weight; weights are codes and the floats of the rest, not step sizes.
        bits_per_code: bits that the file takes per code; 0 for a float model.
        entropy_bits_per_code: entropy of the codes, each tensor by its own frequencies.
        entropy_bytes: the codes at their entropy, and every other value (step sizes too) as it is.
        over_entropy: bytes / entropy_bytes; below 1 where compressed floats save more than names and metadata take.
    """

    bytes: int
    float32_bytes: int
    ratio: float
    bits_per_weight: float
    bits_per_code: float
    entropy_bits_per_code: float
    entropy_bytes: float
    over_entropy: float


def file_sizes(path: Path | str) -> Sizes:
    """Return the sizes of a packed model file; its codes are read.

    `float32_bytes` is exact: it is what `save_packed` writes for the dequantized weights.

    Raises:
        FormatError: no sound packed model file.
    """
    path = Path(path)
    header, layout = read_layout(path)
    coded = code_entropy(read_contents(path, layout).quantized.values())
    plain = layout.rest | {name: TensorInfo("F32", entry.shape) for name, entry in layout.quantized.items()}
    n_weights = sum(math.prod(info.shape) for info in plain.values() if info.dtype in FLOATS)
    n_bytes = path.stat().st_size
    text = plain_text(Layout({}, {}, layout.aliases, layout.metadata, {}))
    float32_bytes = serialized_bytes(plain, {KEY: text})
    bound = coded.bytes + value_bytes(layout)
    return Sizes(
        bytes=n_bytes,
        float32_bytes=float32_bytes,
        ratio=float32_bytes / n_bytes,
        bits_per_weight=8 * n_bytes / max(n_weights, 1),
        bits_per_code=8 * code_bytes(header, layout) / max(coded.n_codes, 1),
        entropy_bits_per_code=coded.bits_per_code,
        entropy_bytes=bound,
        over_entropy=n_bytes / max(bound, 1),
    )


def code_bytes(header: Header, layout: Layout) -> int:
    """Return what the codes of all weights take in the file."""
    return sum(header.tensors[stored_names(name)[0]].n_bytes for name in layout.quantized)


def value_bytes(layout: Layout) -> int:
    """Return what every value that is no code takes when it is stored as it is: step sizes, batch norm, biases."""
    return sum(info.n_bytes for info in [*layout.rest.values(), *(entry.scale for entry in layout.quantized.values())])


def serialized_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> int:
    """Return how many bytes the safetensors library writes for these tensors: length, padded header and data.

    Example:
        >>> serialized_bytes({"bias": TensorInfo("F32", (2,))}, {})
        96
    """
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPE_BYTES)}
    ordered = sorted(tensors.items(), key=lambda item: (-ranks[item[1].dtype], item[0]))
    tree: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in ordered:
        begin, end = end, end + info.n_bytes
        tree[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    n_header = len(json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-n_header // 8) * 8 + end


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
    coded = code_entropy(read_contents(path, layout).quantized.values())
    n_bytes, one = path.stat().st_size, _float32_bytes(layout)
    bound = coded.bytes + value_bytes(layout)
    return EnsembleSizes(
        bytes=n_bytes,
        float32_bytes=one,
        ratio=one / n_bytes,
        float32_models=n_bytes / one,
        n_members=n_members,
        shared_bytes=_shared_bytes(header, layout),
        bits_per_code=8 * code_bytes(header, layout) / max(coded.n_codes, 1),
        entropy_bits_per_code=coded.bits_per_code,
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
    return serialized_bytes(tensors, {KEY: text})


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
