"""The local worker pool: how runs share cores and GPUs, and what happens when a process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from qtdog.core.errors import ConfigError
from qtdog.core.machine import n_cores
from qtdog.data.open import open_any
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import state_folder
from qtdog.sweep.local import LocalEngine, Resources, local_resources, run_task, run_task_from_json, visible_gpus
from qtdog.sweep.plan import make_plan
from qtdog.sweep.runner import Driver, check_tasks, unfinished
from qtdog.sweep.study import Study
from qtdog.training.run import RunCallbacks

FOUR = ("0", "1", "2", "3")


def test_without_gpus_the_workers_use_the_cores():
    assert local_resources(workers=None, threads=None, gpus=None, visible=()) == Resources(n_cores(), 1)
    assert local_resources(workers=None, threads=n_cores(), gpus=None, visible=()) == Resources(1, n_cores())
    assert local_resources(workers=1, threads=None, gpus=0, visible=FOUR) == Resources(1, 1)


@pytest.mark.parametrize(("share", "workers"), [(None, 4), (1, 4), (0.5, 8), (0.3, 13)])
def test_with_gpus_each_worker_has_its_share(share, workers):
    resources = local_resources(workers=None, threads=None, gpus=share, visible=FOUR)
    assert (resources.workers, resources.gpus) == (workers, FOUR)
    in_use = []
    for _ in range(workers):
        in_use.append(resources.least_used_gpu(in_use))
    assert max(in_use.count(gpu) for gpu in FOUR) - min(in_use.count(gpu) for gpu in FOUR) <= 1


def test_gpus_are_named_as_the_environment_names_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5a, GPU-7b")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_gpus() == ("GPU-5a", "GPU-7b")


def test_a_local_run_on_two_gpus_or_on_missing_ones_is_refused():
    with pytest.raises(ConfigError, match="accelerate launch"):
        local_resources(workers=None, threads=None, gpus=2, visible=FOUR)
    with pytest.raises(ConfigError, match="there is no GPU here"):
        local_resources(workers=None, threads=None, gpus=1, visible=())


def test_runs_are_spread_over_the_gpus(make_tiny, running, tmp_path):
    plan = make_tiny()
    engine = LocalEngine(tmp_path, plan.source, Resources(2, 1, ("0", "1")))
    assert not Driver(plan.tasks, tmp_path, engine, running.Quiet()).run().failed
    logs = [(state_folder(tmp_path) / "logs" / f"{task.name}.log").read_text() for task in plan.tasks]
    assert {log.split(" on GPU ")[1][0] for log in logs} == {"0", "1"}


def one_outcome(engine, task):
    engine.start(task)
    while not (outcomes := engine.poll(1.0)):
        pass
    engine.close()
    return outcomes


def test_an_error_before_the_task_is_reported_with_its_traceback(make_tiny, tmp_path):
    task = make_tiny().tasks[0]
    (outcome,) = one_outcome(LocalEngine(tmp_path, "no-such-folder/", Resources(1, 1)), task)
    assert (outcome.status, outcome.error) == ("failed", "DataError")
    assert "no-such-folder" in outcome.reason
    (state_folder(tmp_path) / "logs" / f"{task.name}.log").unlink()
    (state_folder(tmp_path) / "logs").rmdir()
    (state_folder(tmp_path) / "logs").write_text("")  # a file where the folder of the logs should be
    (outcome,) = one_outcome(LocalEngine(tmp_path, "rotated-digits", Resources(1, 1)), task)
    assert (outcome.status, outcome.error) == ("failed", "FileExistsError")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_disk_stops_the_sweep_instead_of_being_tried_again(make_tiny, tmp_path):
    plan = make_tiny()
    logs = state_folder(tmp_path) / "logs"
    logs.mkdir(parents=True)
    (logs / f"{plan.tasks[0].name}.log").symlink_to("/dev/full")
    (outcome,) = one_outcome(LocalEngine(tmp_path, plan.source, Resources(1, 1, ("0",))), plan.tasks[0])
    assert (outcome.status, outcome.error) == ("disk", "OSError")


@pytest.mark.stress
def test_a_killed_fork_server_loses_nothing(make_tiny, local, tmp_path, running):
    plan = make_tiny()
    expected = running.measured(running.in_this_process(plan, tmp_path / "whole"), plan)
    out = tmp_path / "killed"
    engine, display, killed = local(plan, out), running.Quiet(), []

    def kill_server(progress):
        if not killed and len(engine.pids) == 2:
            killed.append(psutil.Process(next(iter(engine.pids.values()))).ppid())
            os.kill(killed[0], signal.SIGKILL)

    display.show = kill_server
    assert not Driver(plan.tasks, out, engine, display, poll_s=0.01).run().failed
    assert killed
    assert not psutil.pid_exists(killed[0]) or psutil.Process(killed[0]).status() == psutil.STATUS_ZOMBIE
    assert [outcome.status for _, outcome in display.ends] == ["done"] * 4
    assert running.measured(out, plan) == expected


@pytest.mark.stress
def test_an_unguarded_script_in_a_folder_with_strange_modules_runs_a_study(make_tiny, tmp_path):
    plan = make_tiny(methods={"float": {"presets": ["float"]}}, grid={"target": "75", "seed": 0})
    text = plan.study.model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(text))
    for name in ("timm", "torchvision", "multiprocessing", "safetensors", "signal"):
        (tmp_path / f"{name}.py").write_text("open('CODE_WAS_RUN', 'a').write(__name__)\nraise ImportError(__name__)")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom qtdog.cli.main import main\n"
        "sys.argv = ['qtdog', 'sweep', 'tiny.yaml', '--out', 'out']\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "run.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 done" in done.stdout
    assert not (tmp_path / "CODE_WAS_RUN").exists()


@pytest.mark.stress
def test_sigterm_leaves_checkpoints_and_no_process(make_tiny, tmp_path):
    plan = make_tiny(set={"train.steps": 100_000}, grid={"target": "75", "seed": 0})
    study, out = tmp_path / "tiny.yaml", tmp_path / "out"
    study.write_text(yaml.safe_dump(plan.study.model_dump(mode="json", exclude_defaults=True)))
    command = [sys.executable, "-m", "qtdog", "sweep", str(study), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(out.glob("*/checkpoint/step-*/checkpoint.json"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the fork server and its workers
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert all(list((out / task.name).glob("checkpoint/step-*/checkpoint.json")) for task in plan.tasks)


@pytest.mark.stress
def test_killed_workers_and_a_killed_driver_lose_nothing(make_tiny, local, tmp_path, running):
    sma = {"presets": ["float"], "set": {"averager.name": "sma", "averager.params": {"start": 24}}}
    methods = {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"]}, "sma": sma}
    changes = {"set": {"train.steps": 60, "train.checkpoint_every": 2}, "share_prefix": True, "share_averaged": True}
    plan = make_tiny(**changes, methods=methods, grid={"target": "75", "seed": 0})
    assert [bool(task.updates_from) for task in plan.tasks] == [False, False, False, True]
    expected = running.measured(running.in_this_process(plan, tmp_path / "whole"), plan)
    out, study = tmp_path / "killed", tmp_path / "tiny.yaml"
    study.write_text(yaml.safe_dump(plan.study.model_dump(mode="json", exclude_defaults=True)))
    command = [sys.executable, "-m", "qtdog", "sweep", str(study), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("*/checkpoint/step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert unfinished(plan.tasks, out)
    engine, display, killed = local(plan, out), running.Quiet(), []

    def kill_two(progress):
        for name, pid in engine.pids.items():
            if len(killed) < 2 and pid not in killed and list((out / name).glob("checkpoint/step-*")):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    display.show = kill_two
    progress = Driver(plan.tasks, out, engine, display, poll_s=0.01, busy_s=0.2).run()
    assert len(killed) == 2
    assert not progress.failed
    lost = [outcome.reason for _, outcome in display.ends if outcome.status == "lost"]
    assert lost == ["its process died of SIGKILL"] * 2
    assert running.measured(out, plan) == expected


SETTINGS = {
    "data.image_size": 8,
    "data.batch_size": 2,
    "model.backbone": "digits_cnn",
    "train.steps": 4,
    "train.eval_every": 2,
}
BROKEN = "night/cat/3.png"


@pytest.fixture
def photos(image_tree):
    os.truncate(image_tree / BROKEN, 70)
    return image_tree


def study(**changes):
    tree = {
        "name": "photos",
        "base": {"presets": ["digits"], "set": SETTINGS | changes.pop("set", {})},
        "methods": {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"], "set": {"quantizer.start_step": 2}}},
        "grid": {"target": "outdoor", "seed": "0..1"},
        "ensembles": [{"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..1"}],
    }
    return Study.model_validate(tree | changes)


def test_a_corrupt_image_is_named_before_anything_starts(photos):
    plan = make_plan(study(), str(photos))
    with pytest.raises(ConfigError, match=r"3\.png cannot be read as an image .* data\.skip_unreadable: true"):
        check_tasks(plan.tasks, plan.dataset)


def test_all_tasks_go_on_without_it_and_their_results_tell(photos, tmp_path):
    plan, out = make_plan(study(set={"data.skip_unreadable": True}), str(photos)), tmp_path / "out"
    assert [key for key, _ in plan.dataset.skipped] == [BROKEN]
    check_tasks(plan.tasks, plan.dataset)
    for task in plan.tasks:
        outcome = run_task(task, out, open_any(str(photos)), RunCallbacks())
        assert outcome.status == "done", outcome
    runs = [RunFolder(task.folder(out)) for task in plan.tasks if task.kind == "run"]
    assert len(runs) == 4
    for folder in runs:
        result = folder.read_result()
        assert result is not None
        assert result["n_skipped"] == 1
        assert [row["image"] for row in json.loads((folder.path / "skipped.json").read_text())] == [BROKEN]


def test_a_task_that_is_sent_elsewhere_leaves_it_out_too(photos, tmp_path):
    plan = make_plan(study(set={"data.skip_unreadable": True}, ensembles=[]), str(photos))
    answer = run_task_from_json(plan.tasks[0].to_json(), str(tmp_path), str(photos), 1)
    assert answer["status"] == "done", answer["reason"]


def test_one_method_that_leaves_it_out_decides_for_all(photos):
    methods = {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"], "set": {"data.skip_unreadable": True}}}
    plan = make_plan(study(methods=methods, ensembles=[]), str(photos))
    assert all(task.config is not None and task.config.data.skip_unreadable for task in plan.tasks)
    check_tasks(plan.tasks, plan.dataset)
