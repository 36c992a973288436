"""Something is computed for each sample, in one thread or in several."""

from __future__ import annotations

import threading
import time

import pytest

from qtdog.data.dataset import iter_samples, map_samples


@pytest.mark.parametrize(("n", "seconds"), [(6000, 0.0), (1500, 2e-4)])
def test_what_takes_little_is_done_by_one_thread(n, seconds):
    """With several, quick calls wait for the interpreter's lock: half a million files took four times as long."""
    threads: list[int] = []
    told: list[tuple[int, int]] = []

    def work(i: int) -> int:
        threads.append(threading.get_ident())
        if seconds:
            time.sleep(seconds)
        return i * i

    assert map_samples(work, n, lambda done, n: told.append((done, n))) == [i * i for i in range(n)]
    assert told[-1] == (n, n)
    here = threads.count(threading.get_ident())
    assert here < 20 if seconds else here > n / 2  # not all: a busy machine makes some quick calls take long


def test_an_error_ends_it():
    seen: list[int] = []

    def work(i: int) -> int:
        seen.append(i)
        if i == 30:
            raise ValueError("broken")
        return i

    results = iter_samples(work, 5000)
    with pytest.raises(ValueError, match="broken"):
        list(results)
    assert max(seen) < 1024
