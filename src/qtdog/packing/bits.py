"""Integer codes as a contiguous stream of exactly `bits` bits each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUP = 8  # eight b-bit codes fill exactly b bytes, and at most one 64-bit word


def packed_bytes(n_codes: int, bits: int) -> int:
    """Return how many bytes `n_codes` codes take: ceil(n_codes · bits / 8).

    Example:
        >>> packed_bytes(9, 7)
        8
    """
    return (n_codes * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the codes as a bit stream.

    Code i, as a two's-complement `bits`-bit number, takes bits i·bits … (i+1)·bits - 1 of the stream, least significant
    first; bit j of the stream is bit j mod 8 of byte j div 8. Unused bits of the last byte are zero.

    Args:
        codes: int8, any shape (taken in row-major order), each in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 8.

    Returns:
        uint8, shape (packed_bytes(codes.numel(), bits),).

    Example:
        >>> pack_codes(torch.tensor([1, -1, 2], dtype=torch.int8), 4)
        tensor([241,   2], dtype=torch.uint8)
    """
    flat = codes.detach().cpu().contiguous().reshape(-1).numpy()
    padded = np.zeros((-(-flat.size // GROUP), GROUP), dtype=np.uint8)
    np.bitwise_and(flat.view(np.uint8), (1 << bits) - 1, out=padded.reshape(-1)[: flat.size])
    words = np.zeros(len(padded), dtype="<u8")
    for index in range(GROUP):
        words |= padded[:, index].astype(np.uint64) << np.uint64(index * bits)
    stream = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return torch.from_numpy(stream[: packed_bytes(flat.size, bits)].copy())


def unpack_codes(stream: Tensor, bits: int, n_codes: int) -> Tensor:
    """Return the `n_codes` codes of a bit stream made by `pack_codes`.

    Args:
        stream: uint8, shape (packed_bytes(n_codes, bits),).
        bits: 2 to 8.
        n_codes: how many codes it holds.

    Returns:
        int8, shape (n_codes,).

    Raises:
        ValueError: the stream has another length, or a padding bit is set.

    Example:
        >>> unpack_codes(torch.tensor([241, 2], dtype=torch.uint8), 4, 3)
        tensor([ 1, -1,  2], dtype=torch.int8)
    """
    data = stream.numpy()
    if data.size != packed_bytes(n_codes, bits):
        raise ValueError(f"{n_codes} codes of {bits} bits take {packed_bytes(n_codes, bits)} bytes, not {data.size}")
    used = (n_codes * bits) % 8
    if used and data[-1] >> used:
        raise ValueError("a padding bit after the last code is set")
    n_groups = -(-n_codes // GROUP)
    padded = np.zeros(n_groups * bits, dtype=np.uint8)
    padded[: data.size] = data
    octets = np.zeros((n_groups, 8), dtype=np.uint8)
    octets[:, :bits] = padded.reshape(n_groups, bits)
    words = octets.view("<u8").reshape(-1)
    codes = np.empty((n_groups, GROUP), dtype=np.int8)
    for index in range(GROUP):
        # Bring the code's sign bit to the top of the word; the arithmetic shift back then extends the sign.
        shifted = words << np.uint64(64 - (index + 1) * bits)
        codes[:, index] = shifted.view("<i8") >> np.int64(64 - bits)
    return torch.from_numpy(codes.reshape(-1)[:n_codes])
