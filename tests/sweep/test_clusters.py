"""Ray gives the same results, also without a shared folder; what a Slurm job asks for."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest

from qtdog.core.errors import ConfigError
from qtdog.sweep.clusters import (
    MEMBER_FILES,
    RayEngine,
    SlurmEngine,
    SlurmJob,
    Work,
    import_ray,
    import_submitit,
    pack,
    run_task_with_files,
    task_files,
    unpack_folder,
)
from qtdog.sweep.plan import EnsembleMembers, Task
from qtdog.sweep.runner import Driver, unfinished


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_gives_the_same_results(make_tiny, tmp_path, monkeypatch, running):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    plan = make_tiny(share_prefix=True, grid={"target": "75", "seed": 0})
    expected = running.measured(running.in_this_process(plan, tmp_path / "here"), plan)
    out = tmp_path / "ray"
    engine = RayEngine(out, plan.source, workers=1, threads=1)
    Driver(plan.tasks, out, engine, running.Quiet()).run()
    assert running.measured(out, plan) == expected


def test_work_elsewhere_needs_only_what_is_sent_and_sends_the_run_back(make_tiny, tmp_path, running):
    plan = make_tiny(share_prefix=True, grid={"target": "75", "seed": 0})
    expected = running.measured(running.in_this_process(plan, tmp_path / "here"), plan)
    out = tmp_path / "there"
    for task in plan.tasks:
        answer, content = run_task_with_files(task.to_json(), task_files(task, out), plan.source, 1)
        assert answer["status"] == "done"
        unpack_folder(content, out / task.name)
    assert running.measured(out, plan) == expected


def test_packing_leaves_out_locks_and_unpacking_replaces(tmp_path):
    made, place = tmp_path / "made", tmp_path / "place"
    for folder in (made, place):
        folder.mkdir()
    for name in ("result.json", ".lock", "x.tmp"):
        (made / name).write_text(name)
    (place / "old").write_text("")
    unpack_folder(pack(made), place)
    assert [path.name for path in place.iterdir()] == ["result.json"]


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'qtdog\[ray\]'"):
        import_ray()


class FakeRay:
    """Runs each task where it is submitted, on a machine that does not see the sweep's folder."""

    exceptions = SimpleNamespace(RayError=RuntimeError, TaskCancelledError=TimeoutError)

    def __init__(self):
        self.sent, self.work = [], []

    def init(self, **options):
        pass

    def shutdown(self):
        pass

    def cluster_resources(self):
        return {"CPU": 2}

    def remote(self, **options):
        return lambda work: SimpleNamespace(remote=self._submit)

    def _submit(self, tree, files, shared_folder, source, threads):
        self.sent.append(sorted(files) if files is not None else None)
        self.work.append((tree, files, source, threads))
        return len(self.work) - 1

    def wait(self, references, num_returns, timeout):
        assert references  # Ray refuses an empty list, and a loop around it would spin
        return references[:1], references[1:]

    def get(self, reference):
        tree, files, source, threads = self.work[reference]
        return (None, b"") if files is None else run_task_with_files(tree, files, source, threads)


def test_files_are_sent_only_after_a_machine_does_not_see_the_folder(make_tiny, tmp_path, running):
    plan = make_tiny(share_prefix=True, grid={"target": "75", "seed": 0})
    ray, out = FakeRay(), tmp_path / "out"
    engine = RayEngine(out, plan.source, workers=1, threads=1, ray=ray)
    Driver(plan.tasks, out, engine, running.Quiet()).run()
    point = plan.tasks[0].name
    assert [task.kind for task in plan.tasks] == ["fork_point", "run", "run"]
    assert ray.sent == [None, [], [point], [point]]
    assert unfinished(plan.tasks, out) == []


def test_an_engine_without_work_waits(tmp_path):
    engine = RayEngine(tmp_path, "rotated-digits", workers=1, threads=1, ray=FakeRay())
    started = time.monotonic()
    assert engine.poll(0.05) == []
    assert time.monotonic() - started >= 0.05


def test_of_members_only_the_files_that_are_read_are_sent(tmp_path):
    for name in ("config.yaml", "result.json", "model.safetensors", "metrics.jsonl", "checkpoint/step-00000002/a"):
        (tmp_path / "member" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "member" / name).write_text("")
    task = Task("e", "ensemble", 0, ensemble=EnsembleMembers("diwa", ("member",)))
    unpack_folder(task_files(task, tmp_path)["member"], tmp_path / "sent")
    assert sorted(path.name for path in (tmp_path / "sent").iterdir()) == sorted(MEMBER_FILES)


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
