"""All values of one type in one stream: byte by byte and compressed, so that floats cost less than four bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qtdog.packing.codecs import may_expand
from qtdog.packing.contents import TORCH_DTYPES
from qtdog.packing.header import DTYPE_BYTES
from qtdog.packing.zstd_frame import compress, decompress

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
