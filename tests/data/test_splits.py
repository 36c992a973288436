"""The split rule against an independent computation of DomainBed's.

Golden values: DomainBed holds out the first int(n · 0.2) of `keys = list(range(n))` after
`np.random.RandomState(seed).shuffle(keys)`, where
`seed = int(hashlib.md5(str((trial, domain)).encode()).hexdigest(), 16) % 2**31`. The constants are what this prints.
"""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.errors import DataError
from qtdog.data.known_datasets import RotatedDigits
from qtdog.data.splits import holdout, make_splits, split_seed, three_way

SIZES = st.integers(0, 500)
FRACS = st.floats(0.01, 0.49)
TRIALS = st.integers(0, 5)


def domainbed(n: int, n_first: int, trial: int, domain_index: int) -> tuple[list[int], list[int]]:
    seed = int(hashlib.md5(str((trial, domain_index)).encode("utf-8")).hexdigest(), 16) % (2**31)
    keys = list(range(n))
    np.random.RandomState(seed).shuffle(keys)
    return keys[:n_first], keys[n_first:]


def test_golden_values() -> None:
    assert [split_seed(0, 0), split_seed(0, 1), split_seed(2, 3)] == [894182419, 1514274641, 1709828778]
    assert holdout(10, 0.2, trial=0, domain_index=0)[1].tolist() == [2, 3]


@given(SIZES, FRACS, TRIALS, st.integers(0, 5))
def test_the_split_is_domainbeds(n: int, frac: float, trial: int, domain_index: int) -> None:
    train, heldout = holdout(n, frac, trial=trial, domain_index=domain_index)
    expected_out, expected_in = domainbed(n, int(n * frac), trial, domain_index)
    assert heldout.tolist() == expected_out
    assert train.tolist() == expected_in


@given(SIZES, FRACS, TRIALS)
def test_three_parts_are_disjoint_and_complete(n: int, frac: float, trial: int) -> None:
    parts = three_way(n, frac, trial=trial, domain_index=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert len(parts[1]) == len(parts[2]) == int(n * frac)
    assert np.array_equal(parts[1], holdout(n, frac, trial=trial, domain_index=1)[1])


def test_every_domain_is_split_and_nothing_is_shared() -> None:
    digits = RotatedDigits()
    splits = make_splits(digits, trial=1)
    for domain in digits.domains:
        split = splits[domain]
        assert np.array_equal(split.everything, digits.indices(domain))
        assert len(split.heldout) == int(0.2 * len(digits.indices(domain)))
        assert len(split.test) == 0
        assert not set(split.train.tolist()) & set(split.heldout.tolist())


def test_trials_differ_and_the_in_domain_mode_keeps_the_heldout_part() -> None:
    digits = RotatedDigits()
    first, second = make_splits(digits, trial=0)["15"], make_splits(digits, trial=1)["15"]
    in_domain = make_splits(digits, trial=0, test_mode="in-domain")["15"]
    assert set(first.heldout.tolist()) != set(second.heldout.tolist())
    assert np.array_equal(first.heldout, in_domain.heldout)
    assert [len(part) for part in (in_domain.train, in_domain.heldout, in_domain.test)] == [180, 60, 60]
    assert np.array_equal(in_domain.everything, first.everything)


def test_a_domain_too_small_to_split_is_named() -> None:
    with pytest.raises(DataError, match=r"domain '0' has 300 images: too few to hold out.*at least 1000\. Add"):
        make_splits(RotatedDigits(), frac=0.001)
