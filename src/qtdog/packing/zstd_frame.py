"""One zstd frame around bytes whose number is known: made small, and opened with suspicion."""

from __future__ import annotations

import zstandard

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
        told = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise ValueError(f"no zstd frame: {error}") from error
    if told.content_size >= zstandard.CONTENTSIZE_ERROR:
        raise ValueError("a zstd frame that does not state its content size")
    return told.content_size


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
    told = zstandard.get_frame_parameters(frame)
    if told.dict_id or not told.has_checksum or told.window_size > max(n_bytes, MIN_WINDOW):
        raise ValueError("a zstd frame with a dictionary, without checksum, or with a window larger than its content")
    try:
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a damaged zstd frame: {error}") from error
    if len(content) != n_bytes:
        raise ValueError(f"a zstd frame that ends after {len(content)} of {n_bytes} bytes")
    return content
