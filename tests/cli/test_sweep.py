"""The sweep commands as a user types them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import time

import pytest
import yaml
from rich.console import Console
from rich.live import Live

from qtdog.cli.sweep_output import ProgressDisplay, progress_display, warning_lines
from qtdog.sweep.journal import Outcome, save_failure
from qtdog.sweep.local import run_task
from qtdog.sweep.plan import make_plan
from qtdog.sweep.runner import SweepProgress as Progress
from qtdog.sweep.study import Study, read_study
from qtdog.training.run import RunCallbacks

SET = {"data.image_size": 8, "data.batch_size": 2, "train.steps": 4, "train.eval_every": 1}
STUDY = {
    "name": "tiny",
    "base": {"presets": ["digits"], "set": SET},
    "methods": {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"]}},
    "grid": {"target": "75", "seed": "0..1"},
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    return file


@pytest.fixture(scope="module")
def runs_of_seed_0(tmp_path_factory):
    """Return a folder with its runs of seed 0; not to be changed."""
    plan, out = make_plan(Study.model_validate(STUDY)), tmp_path_factory.mktemp("made") / "tiny"
    for task in plan.tasks:
        if task.labels[0]["seed"] == 0:
            assert run_task(task, out, plan.dataset, RunCallbacks()).status == "done"
    return out


@pytest.fixture
def half_done(study, runs_of_seed_0, tmp_path):
    """Return the study, with the runs of seed 0 in its default folder."""
    shutil.copytree(runs_of_seed_0, tmp_path / "runs" / "tiny")
    return study


def test_a_sweep_runs_goes_on_and_says_how_it_ended(qtdog, half_done):
    done = qtdog("sweep", half_done, "--workers", "1", "--only", "lsq seed=1")
    assert done.code == 0, done.err
    assert "3 of 4 done in runs/tiny" in done.out
    again = qtdog("sweep", half_done, "--only", "seed=0")
    assert again.code == 0
    found = json.loads(qtdog("runs", "study = 'tiny'", "--json").out)
    assert sorted((row["method"], row["seed"]) for row in found) == [("float", 0), ("lsq", 0), ("lsq", 1)]


def test_status_counts_and_changes_nothing(qtdog, half_done, tmp_path):
    before = sorted(path.name for path in (tmp_path / "runs" / "tiny").iterdir())
    found = json.loads(qtdog("sweep", "status", half_done, "--json").out)
    assert found["counts"] == {"done": 2, "missing": 2}
    text = qtdog("sweep", "status", half_done, "--all").out
    assert "float seed=1 target=75" in text
    assert sorted(path.name for path in (tmp_path / "runs" / "tiny").iterdir()) == before


def test_a_dry_run_estimates_from_finished_runs_and_starts_nothing(qtdog, half_done, tmp_path):
    done = qtdog("sweep", half_done, "--dry-run", "--workers", "8")
    assert done.code == 0, done.err
    assert "missing: 2 runs" in done.out
    assert "2 finished runs" in done.out
    assert "on 8 workers like those of this machine" in " ".join(done.out.split())
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 2


def test_a_dry_run_without_runs_probes_a_few_steps(qtdog, study, tmp_path):
    done = qtdog("sweep", study, "--dry-run", "--workers", "3")
    assert "a few steps made just now" in done.out
    assert "3 workers like those of this machine" in " ".join(done.out.split())
    assert not (tmp_path / "runs").exists()


def test_the_table_says_mean_and_difference(qtdog, half_done):
    text = qtdog("sweep", "table", half_done, "--format", "markdown").out
    assert "| lsq |" in text
    assert "− float" in text
    numbers = json.loads(qtdog("sweep", "table", half_done, "--format", "json", "--reference", "lsq").out)
    assert numbers["test_accuracy"]["differences"]["float"]["n"] == 1
    assert len(numbers["runs"]) == 2


def test_the_table_counts_runs_of_an_earlier_one_whose_folders_are_gone(qtdog, half_done, tmp_path):
    how = ("sweep", "table", half_done, "--format", "json")
    (tmp_path / "first.json").write_text(qtdog(*how).out)
    plan = make_plan(read_study(half_done))
    for task in plan.tasks:
        if task.labels[0]["seed"] == 1:
            assert run_task(task, tmp_path / "runs" / "tiny", plan.dataset, RunCallbacks()).status == "done"
    whole = json.loads(qtdog(*how).out)
    for row in json.loads((tmp_path / "first.json").read_text())["runs"]:
        shutil.rmtree(tmp_path / row["folder"])
    assert len(json.loads(qtdog(*how).out)["runs"]) == 2
    again = qtdog(*how, "--also", tmp_path / "first.json")
    assert json.loads(again.out) == whole
    assert again.err == ""
    text = half_done.read_text()
    half_done.write_text(text.replace("train.steps: 4", "train.steps: 3"))
    other = qtdog(*how, "--also", tmp_path / "first.json")
    assert "2 of the 2 runs" in other.err
    assert other.code == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is no table of a study"),
        ('{"runs": [{"folder": "a", "test_accuracy": "high"}]}', "a run with a wrong test_accuracy"),
        ('{"runs": [{"test_accuracy": 0.5}]}', "a run with a wrong folder"),
        ('{"runs": 3}', "qtdog sweep table STUDY --format json makes one"),
    ],
)
def test_what_is_no_earlier_table_is_refused(qtdog, half_done, text, message, tmp_path):
    if text is not None:
        (tmp_path / "other.json").write_text(text)
    done = qtdog("sweep", "table", half_done, "--also", "other.json")
    assert done.code == 2
    assert message in " ".join(done.err.split())


def test_runs_as_csv_for_a_spreadsheet(qtdog, half_done):
    text = qtdog("runs", "bits = 7", "--csv", "--columns", "quantizer,seed,test_accuracy").out
    assert [row["quantizer"] for row in csv.DictReader(io.StringIO(text))] == ["lsq"]


def test_merge_and_retry(qtdog, half_done, tmp_path):
    assert "2 copied" in qtdog("sweep", "merge", tmp_path / "runs" / "tiny", "--into", tmp_path / "all").out
    assert "nothing failed" in qtdog("sweep", "retry", half_done).out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sweep", "gone.yaml"), "the study file gone.yaml does not exist"),
        (("sweep", "tiny.yaml", "--only", "nothing"), "means no run of the study"),
        (("sweep", "tiny.yaml", "--address", "auto"), "--address is for --engine ray"),
        (("sweep", "retry", "tiny.yaml", "--address", "auto"), "--address is for --engine ray"),
        (("sweep", "retry", "tiny.yaml", "--log", "wandbb"), "did you mean 'wandb'?"),
        (("sweep", "table", "tiny.yaml"), "no run of the study is finished"),
        (("runs", "a", "--out", "gone"), "gone is no folder"),
        (("sweep", "merge", "gone", "--into", "all"), "gone is no folder"),
    ],
)
def test_mistakes_are_told_and_nothing_starts(qtdog, study, args, message, tmp_path):
    done = qtdog(*args)
    assert done.code in (1, 2)
    assert message in done.err
    assert not (tmp_path / "runs").exists()


def test_mistakes_in_the_study_are_told_all_at_once(qtdog, study, tmp_path):
    methods = {"a": {"presets": ["lqs"]}, "b": {"set": {"objective.name": "emr"}}, "c": {"set": {"train.stepz": 1}}}
    study.write_text(yaml.safe_dump(STUDY | {"methods": methods}))
    done = qtdog("sweep", study)
    assert done.code == 2
    assert "did you mean 'lsq'" in done.err
    assert "did you mean 'steps'" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"averager.name": "swda"}, "unknown averager 'swda'"),
        ({"quantizer.name": "lsqq"}, "did you mean 'lsq'"),
    ],
)
def test_a_dry_run_checks_as_the_sweep_does(qtdog, study, changes, message):
    study.write_text(yaml.safe_dump(STUDY | {"methods": {"a": {"set": changes}}}))
    done = qtdog("sweep", study, "--dry-run")
    assert done.code == 2
    assert message in done.err


def test_a_dry_run_of_slurm_needs_no_gpu_of_this_machine(qtdog, study):
    done = qtdog("sweep", study, "--engine", "slurm", "--dry-run", "--gpus", "1", "--partition", "gpu")
    assert done.code == 0, done.err
    assert "gpus_per_node=1, partition=gpu" in " ".join(done.out.split())


def test_a_run_that_learned_nothing_is_named_in_the_terminal_and_in_the_status(qtdog, study):
    spoiled = {**STUDY, "base": {"presets": ["digits"], "set": {**SET, "train.steps": 50, "optimizer.lr": 1e-9}}}
    study.write_text(yaml.safe_dump(spoiled))
    done = qtdog("sweep", study, "--workers", "1", "--only", "float seed=0")
    assert done.code == 0, done.err
    assert "warning: float seed=0 target=75: the network learned next to nothing" in done.err
    assert "float seed=0 target=75: warned: the network learned next to nothing" in qtdog("sweep", "status", study).out
    tasks = json.loads(qtdog("sweep", "status", study, "--json").out)["tasks"]
    warned = {task["folder"]: task["warnings"] for task in tasks if "warnings" in task}
    assert [len(texts) for texts in warned.values()] == [1]


def test_what_many_runs_warn_of_alike_is_said_once(capsys, tmp_path):
    tasks = make_plan(Study.model_validate(STUDY)).tasks
    with progress_display(tmp_path) as display:
        for task in tasks:
            display.ended(task, Outcome(task.name, "done", warnings=("slow", f"odd in {task.name}")))
    with contextlib.suppress(RuntimeError), progress_display(tmp_path) as display:
        display.n_repeated = 7
        raise RuntimeError("stopped half-way")
    said = capsys.readouterr().err
    assert "7 more warnings" in said
    assert (said.count(": slow"), said.count(": odd in")) == (1, 4)
    assert "3 more warnings say the same of other runs" in said
    lines = warning_lines(tasks, {task.name: ["slow"] for task in tasks})
    assert len(lines) == 1
    assert "and 1 more: warned: slow" in lines[0]


def test_retry_from_the_start_spares_runs_that_another_machine_finished(qtdog, half_done, tmp_path):
    plan, folder = make_plan(read_study(half_done)), tmp_path / "runs" / "tiny"
    finished = next(task for task in plan.tasks if task.labels[0]["seed"] == 0)
    model = finished.folder(folder) / "model.safetensors"
    before = model.stat()
    save_failure(Outcome(finished.name, "failed", "no luck", "RunError"), folder)
    done = qtdog("sweep", "retry", half_done, "--fresh", "--workers", "1")
    assert done.code == 0, done.err
    assert f"{finished.name} is finished or in use, and is kept" in done.out
    assert model.stat().st_mtime_ns == before.st_mtime_ns


def test_the_live_table_says_what_runs_and_what_failed_before_the_end(study, tmp_path):
    plan = make_plan(read_study(study))
    stream = io.StringIO()
    with Live(console=Console(file=stream, force_terminal=True, width=100), auto_refresh=False) as live:
        display = ProgressDisplay(tmp_path, live)
        progress = Progress(plan.tasks, list(plan.tasks[1:]))
        progress.running = {plan.tasks[0].name: (plan.tasks[0], time.monotonic() - 5)}
        progress.failed = {"x": Outcome("x", "failed", "no luck")}
        display.show(progress)
        shown = stream.getvalue()
    assert "float seed=0 target=75" in shown
    assert "0/4" in shown
    assert "0 of 4 done, 1 running" in shown
    assert "1 failed" in shown
