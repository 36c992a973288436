from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qtdog.data.open import open_any
from qtdog.sweep import estimate
from qtdog.sweep.estimate import Throughput
from qtdog.sweep.journal import Outcome, append_journal


def test_a_probe_has_the_threads_of_a_run_and_one_slow_step_does_not_count(monkeypatch, short_config):
    clock, seen = iter([0, 9, 10, 12, 20, 22, 30, 32, 40, 42, 50, 90]), []
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(estimate, "begin_step", lambda parts, step: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    assert estimate.probe(short_config(), open_any("rotated-digits"), threads=3) == 2.0
    assert seen == [3] * 6
    assert torch.get_num_threads() == before


def test_a_task_of_several_sittings_says_nothing_of_the_overhead(tmp_path):
    append_journal(Outcome("whole", "done", seconds=12.0, trained_s=10.0), 5, tmp_path)
    assert Throughput([], tmp_path).overhead == pytest.approx(1.2)
    append_journal(Outcome("resumed", "done", seconds=2.0, trained_s=10.0), 5, tmp_path)
    assert Throughput([], tmp_path).overhead == pytest.approx(1.2)
