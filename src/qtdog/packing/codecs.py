"""How a stream of codes is stored: bit-packed, or entropy-coded by zstd, whichever is smallest."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qtdog.packing.bits import pack_codes, packed_bytes, unpack_codes
from qtdog.packing.zstd_frame import compress, decompress

BITS, BYTES_ZSTD, BITS_ZSTD = CODECS = ("bits", "bytes+zstd", "bits+zstd")
# Huffman coding of literals is all that helps with codes; higher levels look for repetitions that are not there.
LEVEL = 1
MAX_EXPANSION = 64


def may_expand(n_values: int, n_stored: int) -> bool:
    """Return whether `n_stored` bytes of a file may stand for `n_values` bytes of memory: at most 64 for one.

    Example:
        >>> may_expand(640, 10), may_expand(641, 10)
        (True, False)
    """
    return n_values <= MAX_EXPANSION * n_stored


def encode_codes(codes: Tensor, bits: int) -> tuple[str, Tensor]:
    """Return the name of the smallest codec for these codes, and the stream.

    Args:
        codes: int8, any shape (taken in row-major order), each in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 8.

    Returns:
        A name of `CODECS`; uint8, shape (n,).

    Example:
        >>> noise = torch.randn(8000, generator=torch.Generator().manual_seed(0))
        >>> codes = (5 * noise).round().to(torch.int8)
        >>> codec, stream = encode_codes(codes, 7)
        >>> codec, round(8 * len(stream) / 8000, 1), torch.equal(decode_codes(stream, codec, 7, 8000), codes)
        ('bytes+zstd', 4.5, True)
    """
    flat = codes.detach().cpu().contiguous().reshape(-1).to(torch.int8)
    packed = pack_codes(flat, bits)
    candidates = {
        BITS: packed,
        BYTES_ZSTD: _tensor(compress(flat.numpy().tobytes(), LEVEL)),
        BITS_ZSTD: _tensor(compress(packed.numpy().tobytes(), LEVEL)),
    }
    allowed = [name for name in CODECS if name == BITS or may_expand(flat.numel(), len(candidates[name]))]
    best = min(allowed, key=lambda name: len(candidates[name]))
    return best, candidates[best]


def decode_codes(stream: Tensor, codec: str, bits: int, n_codes: int) -> Tensor:
    """Return the codes of a stream made by `encode_codes`; not every one need be on the grid of a damaged stream.

    Args:
        stream: uint8, shape (n,).
        codec: a name of `CODECS`.
        bits: 2 to 8.
        n_codes: how many codes it holds.

    Returns:
        int8, shape (n_codes,).

    Raises:
        ValueError: the stream is not one of `n_codes` codes.
    """
    if codec == BYTES_ZSTD:
        content = decompress(stream.numpy().tobytes(), n_codes)
        return torch.from_numpy(np.frombuffer(content, dtype=np.int8).copy())
    if codec == BITS_ZSTD:
        stream = _tensor(decompress(stream.numpy().tobytes(), packed_bytes(n_codes, bits)))
    return unpack_codes(stream, bits, n_codes)


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
