"""How long a study takes: the probe of a few steps, and the journal of what is done."""

from __future__ import annotations

import pytest
import torch

from qtdog.data.open import open_any
from qtdog.sweep.estimate import Throughput
from qtdog.sweep.journal import Outcome, append_journal
from qtdog.training.step_time import probe


def test_a_probe_has_the_threads_of_a_run_and_one_slow_step_does_not_count(short_config):
    times, seen = iter([0, 9, 10, 12, 20, 22, 30, 32, 40, 42, 50, 90]), []

    def clock():
        seen.append(torch.get_num_threads())
        return float(next(times))

    before = torch.get_num_threads()
    assert probe(short_config(), open_any("rotated-digits"), threads=3, clock=clock) == 2.0
    assert seen == [3] * 12
    assert torch.get_num_threads() == before


def test_a_resumed_task_does_not_count_for_the_overhead(tmp_path):
    append_journal(Outcome("whole", "done", seconds=12.0, trained_s=10.0), 5, tmp_path)
    assert Throughput([], tmp_path).overhead == pytest.approx(1.2)
    append_journal(Outcome("resumed", "done", seconds=2.0, trained_s=10.0), 5, tmp_path)
    assert Throughput([], tmp_path).overhead == pytest.approx(1.2)
