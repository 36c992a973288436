"""Ray gives the same results, and so does a machine that does not share the folder."""

from __future__ import annotations

import sys

import pytest

from qtdog.core.errors import ConfigError
from qtdog.sweep.ray import RayEngine, import_ray
from qtdog.sweep.runner import Driver
from qtdog.sweep.worker import do_task_elsewhere, inputs, pack, unpack


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
        answer, content = do_task_elsewhere(task.to_json(), inputs(task, out), plan.source, 1)
        assert answer["status"] == "done"
        unpack(content, out / task.name)
    assert running.measured(out, plan) == expected


def test_packing_leaves_out_locks_and_unpacking_replaces(tmp_path):
    made, place = tmp_path / "made", tmp_path / "place"
    for folder in (made, place):
        folder.mkdir()
    for name in ("result.json", ".lock", "x.tmp"):
        (made / name).write_text(name)
    (place / "old").write_text("")
    unpack(pack(made), place)
    assert [path.name for path in place.iterdir()] == ["result.json"]


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'qtdog\[ray\]'"):
        import_ray()
