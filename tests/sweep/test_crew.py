"""How runs share the cores and GPUs of a machine."""

from __future__ import annotations

import pytest
import torch

from qtdog.core.errors import ConfigError
from qtdog.core.machine import n_cores
from qtdog.sweep.journal import state_folder
from qtdog.sweep.local import Crew, LocalEngine, make_crew, visible_gpus
from qtdog.sweep.runner import Driver


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has four GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_without_gpus_the_workers_use_the_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert make_crew(workers=None, threads=None, gpus=None) == Crew(n_cores(), 1)
    assert make_crew(workers=None, threads=n_cores(), gpus=None) == Crew(1, n_cores())
    assert make_crew(workers=1, threads=None, gpus=0) == Crew(1, n_cores())


@pytest.mark.parametrize(("share", "workers"), [(None, 4), (1, 4), (0.5, 8), (0.3, 13)])
def test_with_gpus_each_worker_has_its_share(gpus, share, workers):
    crew = make_crew(workers=None, threads=None, gpus=share)
    assert (crew.workers, crew.gpus) == (workers, ("0", "1", "2", "3"))
    in_use = []
    for _ in range(workers):
        in_use.append(crew.emptiest(in_use))
    assert max(in_use.count(gpu) for gpu in crew.gpus) - min(in_use.count(gpu) for gpu in crew.gpus) <= 1


def test_gpus_can_be_left_alone_or_named(gpus, monkeypatch):
    assert make_crew(workers=None, threads=None, gpus=0).gpus == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a, GPU-7b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus() == ("GPU-5a", "GPU-7b")


def test_a_local_run_on_two_gpus_or_on_missing_ones_is_refused(gpus, monkeypatch):
    with pytest.raises(ConfigError, match="accelerate launch"):
        make_crew(workers=None, threads=None, gpus=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="there is no GPU here"):
        make_crew(workers=None, threads=None, gpus=1)


def test_runs_are_spread_over_the_gpus(make_tiny, running, tmp_path):
    plan = make_tiny()
    engine = LocalEngine(tmp_path, plan.source, Crew(2, 1, ("0", "1")))
    assert not Driver(plan.tasks, tmp_path, engine, running.Quiet()).run().failed
    logs = [(state_folder(tmp_path) / "logs" / f"{task.name}.log").read_text() for task in plan.tasks]
    assert {log.split(" on GPU ")[1][0] for log in logs} == {"0", "1"}
