"""How large a model file is, beside the same model in float32 and beside what the entropy of its codes allows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtdog.packing.description import plain_text
from qtdog.packing.entropy import code_entropy
from qtdog.packing.header import DTYPE_BYTES, Header, TensorInfo
from qtdog.packing.layout import KEY, Layout, stored_names
from qtdog.packing.packed_file import read_contents
from qtdog.packing.read_layout import read_layout

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
    entropy = code_entropy(read_contents(path, layout).quantized.values())
    plain = layout.rest | {name: TensorInfo("F32", entry.shape) for name, entry in layout.quantized.items()}
    n_weights = sum(math.prod(info.shape) for info in plain.values() if info.dtype in FLOATS)
    n_bytes = path.stat().st_size
    text = plain_text(Layout({}, {}, layout.aliases, layout.metadata, {}))
    float32_bytes = serialised_bytes(plain, {KEY: text})
    bound = entropy.bytes + value_bytes(layout)
    return Sizes(
        bytes=n_bytes,
        float32_bytes=float32_bytes,
        ratio=float32_bytes / n_bytes,
        bits_per_weight=8 * n_bytes / max(n_weights, 1),
        bits_per_code=8 * code_bytes(header, layout) / max(entropy.n_codes, 1),
        entropy_bits_per_code=entropy.bits_per_code,
        entropy_bytes=bound,
        over_entropy=n_bytes / max(bound, 1),
    )


def code_bytes(header: Header, layout: Layout) -> int:
    """Return what the codes of all weights take in the file."""
    return sum(header.tensors[stored_names(name)[0]].n_bytes for name in layout.quantized)


def value_bytes(layout: Layout) -> int:
    """Return what every value that is no code takes when it is stored as it is: step sizes, batch norm, biases."""
    return sum(info.n_bytes for info in [*layout.rest.values(), *(entry.scale for entry in layout.quantized.values())])


def serialised_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> int:
    """Return how many bytes the safetensors library writes for these tensors: length, padded header and data.

    Example:
        >>> serialised_bytes({"bias": TensorInfo("F32", (2,))}, {})
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
