"""How a stream of codes is stored: bit-packed, or entropy-coded by zstd, whichever is smallest."""

from __future__ import annotations

import numpy as np
import torch
import zstandard
from torch import Tensor

MIN_WINDOW = 1024  # zstd has no smaller one


def compress(data: bytes, level: int) -> bytes:
    """Return `data` as one zstd frame that states its content size and ends with a checksum.

    Args:
        data: anything.
        level: zstd's, 1 (fast) to 19. The bytes of the frame depend on it and on the version of the zstd library.

    Example:
        >>> decompress(compress(b"codes", 1), 5)
        b'codes'
    """
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(data)


def content_bytes(frame: bytes) -> int:
    """Return how many bytes a frame says that it holds; nothing is decoded.

    Raises:
        ValueError: no zstd frame, or one that does not state it.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise ValueError(f"no zstd frame: {error}") from error
    if parameters.content_size >= zstandard.CONTENTSIZE_ERROR:
        raise ValueError("a zstd frame that does not state its content size")
    return parameters.content_size


def decompress(frame: bytes, n_bytes: int) -> bytes:
    """Return the content of a frame; memory is taken for `n_bytes` of it and no more.

    Args:
        frame: one whole zstd frame.
        n_bytes: how many bytes it must hold.

    Raises:
        ValueError: no zstd frame, another content size, a dictionary, a window larger than the content, bytes after the
            frame, or content that does not match its checksum.
    """
    found = content_bytes(frame)
    if found != n_bytes:
        raise ValueError(f"a zstd frame of {found} bytes, expected {n_bytes}")
    parameters = zstandard.get_frame_parameters(frame)
    if parameters.dict_id or not parameters.has_checksum or parameters.window_size > max(n_bytes, MIN_WINDOW):
        raise ValueError("a zstd frame with a dictionary, without checksum, or with a window larger than its content")
    try:
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a damaged zstd frame: {error}") from error
    if len(content) != n_bytes:
        raise ValueError(f"a zstd frame that ends after {len(content)} of {n_bytes} bytes")
    return content


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
