"""Each codec gives back what it was given, the smallest is chosen, and a bad stream is an error, not an answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from qtdog.packing.codecs import (
    CODECS,
    MAX_EXPANSION,
    compress,
    decode_codes,
    decompress,
    encode_codes,
    pack_codes,
    packed_bytes,
)
from qtdog.packing.layout import DTYPE_BYTES
from qtdog.packing.reader import decode_pool, encode_pool
from qtdog.packing.sizes import entropy_bits


def gaussian(n, sigma, bits, seed=0):
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * sigma
    return noise.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


@given(st.integers(2, 8), st.integers(1, 4000), st.floats(0.1, 60), st.integers(0, 10**6))
def test_any_codes_come_back_and_never_take_more_than_b_bits(bits, n, sigma, seed):
    codes = gaussian(n, sigma, bits, seed)
    codec, stream = encode_codes(codes, bits)
    assert len(stream) <= packed_bytes(n, bits)
    assert codec == "bits" or n <= MAX_EXPANSION * len(stream)
    assert torch.equal(decode_codes(stream, codec, bits, n), codes)


@pytest.mark.parametrize(
    ("bits", "sigma", "expected"), [(7, 5.0, "bytes+zstd"), (4, 1.6, "bits+zstd"), (2, 9.0, "bits+zstd")]
)
def test_gaussian_codes_take_little_more_than_their_entropy(bits, sigma, expected):
    codes = gaussian(300_000, sigma, bits)
    codec, stream = encode_codes(codes, bits)
    assert codec == expected
    bound = 300_000 * entropy_bits(codes) / 8
    assert bound * 0.999 < len(stream) < bound * 1.02


def test_uniform_codes_are_only_packed():
    codes = torch.from_numpy(np.random.default_rng(0).integers(-64, 64, 50_000).astype(np.int8))
    assert encode_codes(codes, 7)[0] == "bits"


def test_what_would_expand_too_far_is_only_packed():
    codec, stream = encode_codes(torch.zeros(100_000, dtype=torch.int8), 2)
    assert (codec, len(stream)) == ("bits", 25_000)


@pytest.mark.parametrize("codec", CODECS)
def test_a_stream_of_another_number_of_codes_is_an_error(codec):
    packed = pack_codes(gaussian(1000, 5, 7), 7).numpy().tobytes()
    data = {"bits": packed, "bits+zstd": compress(packed, 1), "bytes+zstd": compress(bytes(1000), 1)}[codec]
    stream = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    assert len(decode_codes(stream, codec, 7, 1000)) == 1000
    for n in (992, 1008):
        with pytest.raises(ValueError, match="bytes"):
            decode_codes(stream, codec, 7, n)


BAD_FRAMES = {
    "nothing": (b"", "no zstd frame"),
    "another format": (b"\x1f\x8b\x08\x00" * 9, "no zstd frame"),
    "another length": (compress(bytes(99), 1), "99 bytes, expected 100"),
    "unknown length": (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100)), "does not state"),
    "no checksum": (zstandard.ZstdCompressor(write_checksum=False).compress(bytes(100)), "without checksum"),
    "a skippable frame": (b"\x50\x2a\x4d\x18\x64\0\0\0" + bytes(100), "zstd frame"),
    "cut short": (compress(bytes(range(100)), 1)[:-5], "damaged"),
    "bytes after it": (compress(bytes(100), 1) + b"\0", "damaged"),
    "two frames": (compress(bytes(100), 1) * 2, "damaged"),
    "a wrong checksum": (compress(bytes(range(100)), 1)[:-1] + b"\0", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames_are_refused(name):
    frame, message = BAD_FRAMES[name]
    with pytest.raises(ValueError, match=message):
        decompress(frame, 100)


def test_a_window_larger_than_the_content_is_refused():
    """Decoders take memory for the window: it must not be what an attacker likes."""
    frame = bytearray(compress(bytes(range(200)) * 2, 1))
    assert frame[4] & 0x20  # one segment: two bytes of content size follow the descriptor
    frame[4] &= ~0x20
    frame[5:5] = b"\x98"  # a window of 2^29 bytes
    assert zstandard.get_frame_parameters(bytes(frame)).window_size == 2**29
    with pytest.raises(ValueError, match="window larger"):
        decompress(bytes(frame), 400)


VALUES = {
    "F32": torch.randn(1000, generator=torch.Generator().manual_seed(0)),
    "F64": torch.arange(7, dtype=torch.float64) / 3,
    "F16": torch.arange(40, dtype=torch.float16),
    "BF16": torch.arange(40, dtype=torch.bfloat16),
    "I64": torch.full((200,), 1000),
    "I32": torch.arange(3, dtype=torch.int32),
    "U8": torch.arange(250, dtype=torch.uint8),
    "BOOL": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("dtype", VALUES)
def test_values_of_every_type_come_back_bit_for_bit(dtype):
    value = VALUES[dtype]
    given = [value, value[:0], value[0], value[:2].reshape(1, 2, 1)]
    codec, stream = encode_pool(dtype, given)
    n_bytes = DTYPE_BYTES[dtype] * (value.numel() + 3)
    assert len(stream) == n_bytes if codec == "plain" else len(stream) < n_bytes
    back = decode_pool(dtype, stream, codec, [tuple(value.shape) for value in given])
    for found, expected in zip(back, given, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert found.untyped_storage().nbytes() == found.nbytes  # keeps nothing else alive


def test_floats_that_are_alike_in_sign_and_exponent_are_smaller():
    value = 1 + torch.rand(5000, generator=torch.Generator().manual_seed(0))
    codec, stream = encode_pool("F32", [value])
    assert codec == "planes+zstd"
    assert 3 * 5000 * 0.9 < len(stream) < 3.1 * 5000


def test_special_floats_come_back_bit_for_bit():
    value = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45] * 50)
    codec, stream = encode_pool("F32", [value])
    back = decode_pool("F32", stream, codec, [(250,)])[0]
    assert torch.equal(back.view(torch.int32), value.view(torch.int32))


def test_a_pool_of_another_size_is_an_error():
    codec, stream = encode_pool("F32", [torch.zeros(100)])
    for shape in ((99,), (101,)):
        with pytest.raises(ValueError, match="bytes"):
            decode_pool("F32", stream, codec, [shape])
    with pytest.raises(ValueError, match="400 bytes of values expected, found 8"):
        decode_pool("F32", torch.zeros(8, dtype=torch.uint8), "plain", [(100,)])


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=300))
def test_entropy_is_that_of_the_frequencies(codes):
    p = np.unique(codes, return_counts=True)[1] / len(codes)
    assert entropy_bits(torch.tensor(codes, dtype=torch.int8)) == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-12)
