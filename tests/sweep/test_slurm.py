"""Slurm through submitit: what a job asks for, and the same code without Slurm."""

from __future__ import annotations

import sys

import pytest

from qtdog.core.errors import ConfigError
from qtdog.sweep.runner import Driver
from qtdog.sweep.slurm import SlurmEngine, SlurmJob, Work, import_submitit


def test_a_job_asks_for_what_was_asked():
    asked = SlurmJob(threads=4, gpus=2, hours=1.5, partition="gpu").parameters
    assert (asked["cpus_per_task"], asked["gpus_per_node"], asked["time"], asked["partition"]) == (4, 2, 90, "gpu")
    assert asked["signal_delay_s"] == 120
    assert SlurmJob().parameters.keys().isdisjoint({"gpus_per_node", "partition"})


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves its logs open
def test_jobs_give_the_same_results(make_tiny, tmp_path, running):
    pytest.importorskip("submitit")
    plan = make_tiny(share_prefix=True, grid={"target": "75", "seed": 0})
    expected = running.measured(running.in_this_process(plan, tmp_path / "here"), plan)
    out = tmp_path / "jobs"
    engine = SlurmEngine(out, plan.source, workers=1, job=SlurmJob(), cluster="debug")
    progress = Driver(plan.tasks, out, engine, running.Quiet()).run()
    assert not progress.failed
    assert running.measured(out, plan) == expected


def test_a_job_whose_time_is_over_goes_on_in_a_new_one():
    pytest.importorskip("submitit")
    work = Work("out", "rotated-digits", 1)
    again = work.checkpoint({"name": "a"})
    assert (again.function, again.args) == (work, ({"name": "a"},))


def test_without_submitit_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'qtdog\[slurm\]'"):
        import_submitit()
