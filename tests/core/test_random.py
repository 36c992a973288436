import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.random import derive, numpy_stream, torch_stream


@given(st.integers(0, 2**40), st.integers(0, 10**6))
def test_streams_depend_on_seed_name_and_position_only(seed, step):
    assert derive(seed, "a", step) == derive(seed, "a", step)
    assert (
        len(
            {derive(seed, "a", step), derive(seed, "b", step), derive(seed, "a", step + 1), derive(seed + 1, "a", step)}
        )
        == 4
    )
    assert 0 <= derive(seed, "a", step) < 2**63


def test_number_and_text_are_different_names():
    assert derive(0, 1) != derive(0, "1")
    assert derive(0, "a", "b") != derive(0, "ab")


def test_generators_start_anew_each_time():
    assert np.array_equal(numpy_stream(1, "x").random(3), numpy_stream(1, "x").random(3))
    assert torch.equal(torch.rand(3, generator=torch_stream(1, "x")), torch.rand(3, generator=torch_stream(1, "x")))


def test_known_value_stays():  # a changed derivation would silently change every run of every user
    assert derive(0, "augment", 3) == GOLDEN


# made by: h = hashlib.blake2b(b"0\x1fstr:augment\x1fint:3", digest_size=8).digest()
#          int.from_bytes(h, "little") >> 1
GOLDEN = 87771504664392471
