"""How large a model file is, and how large the same model is in float32: from the file on disk, everything counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtdog.packing.header import DTYPE_BYTES, TensorInfo
from qtdog.packing.layout import KEY, Layout, read_layout, rest_names, to_text

FLOATS = {"F16", "BF16", "F32", "F64"}


@dataclass(frozen=True)
class Sizes:
    """The size of a packed model file.

    Attributes:
        bytes: of the file on disk: header, codes, step sizes, float rest and metadata.
        float32_bytes: of the same model with float32 weights, in the same kind of file with the same metadata.
        ratio: float32_bytes / bytes.
        bits_per_weight: bits of the file per weight; weights are codes and the floats of the rest, not step sizes.
    """

    bytes: int
    float32_bytes: int
    ratio: float
    bits_per_weight: float


def file_sizes(path: Path | str) -> Sizes:
    """Return the sizes of a packed model file; only its header is read.

    `float32_bytes` is exact: it is what `save_packed` writes for the dequantized weights.

    Raises:
        FormatError: no packed model file.
    """
    path = Path(path)
    header, layout = read_layout(path)
    plain = {name: header.tensors[name] for name in rest_names(layout, header.tensors)}
    plain |= {name: TensorInfo("F32", entry.shape) for name, entry in layout.quantized.items()}
    n_weights = sum(math.prod(info.shape) for info in plain.values() if info.dtype in FLOATS)
    n_bytes = path.stat().st_size
    text = to_text(Layout({}, layout.aliases, layout.metadata))
    float32_bytes = serialised_bytes(plain, {KEY: text})
    return Sizes(n_bytes, float32_bytes, float32_bytes / n_bytes, 8 * n_bytes / max(n_weights, 1))


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
