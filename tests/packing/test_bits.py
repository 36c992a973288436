import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.packing.codecs import pack_codes, packed_bytes, unpack_codes


def by_hand(codes, bits):
    """The norm, bit by bit: code i takes bits i·b … (i+1)·b - 1, least significant first."""
    stream = [(code >> j) & 1 for code in codes for j in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << j for j, bit in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8)]


@given(st.integers(2, 8), st.integers(0, 300), st.integers(0, 10**6))
def test_round_trip_and_exact_size(bits, n, seed):
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), n).astype(np.int8))
    stream = pack_codes(codes, bits)
    assert len(stream) == packed_bytes(n, bits) == -(-n * bits // 8)
    assert stream.tolist() == by_hand(codes.tolist(), bits)
    assert torch.equal(unpack_codes(stream, bits, n), codes)


def test_any_shape_and_memory_format_is_taken_in_row_major_order():
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last)
    assert torch.equal(unpack_codes(pack_codes(codes, 5), 5, 16), torch.arange(-8, 8, dtype=torch.int8))


def test_wrong_length_and_dirty_padding_are_refused():
    stream = pack_codes(torch.ones(3, dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="2 bytes, not 1"):
        unpack_codes(stream[:1], 3, 3)
    stream[-1] |= 0x80
    with pytest.raises(ValueError, match="padding bit"):
        unpack_codes(stream, 3, 3)
