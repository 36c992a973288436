"""Starts that fail, dry runs and names: what a user meets first, each with the remedy that applies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image

from qtdog.models.network import WIDTHS, digits_cnn
from qtdog.models.weights import is_installed
from qtdog.sweep.journal import save_labels
from qtdog.sweep.local import run_task
from qtdog.sweep.plan import make_plan
from qtdog.sweep.study import read_study
from qtdog.training.run import RunCallbacks

SMALL = ("--steps", 2, "--batch-size", 2, "--image-size", 12, "--set", "train.eval_every=2")
NET = ("--backbone", "digits_cnn", "--weights", "none", *SMALL)
BASE = {"presets": ["digits"], "set": {"data.image_size": 12, "data.batch_size": 2, "train.steps": 4}}


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def study(folder: Path, **parts: Any) -> Path:
    tree = {"name": "small", "base": BASE, "methods": {"a": {}}, "grid": {"target": ["75"], "seed": [0]}} | parts
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return folder / "study.yaml"


@pytest.mark.usefixtures("no_hub")
def test_a_start_that_fails_leaves_a_folder_that_takes_other_options(qtdog: Any, image_tree: Path, tmp_path: Path):
    run = tmp_path / "run"
    given = ("--data", image_tree, "--target", "night", *SMALL, "-o", run)
    assert "did you mean 'resnet50'" in qtdog("train", *given, "--backbone", "resnet5O").err
    told = qtdog("train", *given, "--backbone", "test_resnet")
    assert "huggingface.co does not answer" in told.err
    assert ("--backbone tf_efficientnet_lite0, whose weights are here" in told.err) == is_installed()
    (image_tree / "indoor" / "cat" / "9.png").write_text("no image")
    assert "9.png cannot be read" in qtdog("train", *given, "--backbone", "digits_cnn", "--weights", "none").err
    assert not (run / "config.yaml").exists()
    (image_tree / "indoor" / "cat" / "9.png").unlink()
    assert qtdog("train", *given, "--backbone", "digits_cnn", "--weights", "none").code == 0


@pytest.mark.usefixtures("no_hub")
def test_images_are_checked_before_weights(qtdog: Any, image_tree: Path, tmp_path: Path):
    (image_tree / "indoor" / "cat" / "9.png").write_text("no image")
    told = qtdog("train", "--data", image_tree, "--backbone", "test_resnet", *SMALL, "-o", tmp_path / "run")
    assert "9.png cannot be read" in told.err


@pytest.mark.parametrize("name", ["model.", "_orig_mod.module.", "backbone."])
def test_weights_of_other_trainers_load(qtdog: Any, image_tree: Path, tmp_path: Path, name: str):
    state = {f"{name}{key}": value for key, value in digits_cnn(WIDTHS["digits_cnn"], channels=3).state_dict().items()}
    torch.save({"model_ema": state, "epoch": 3}, tmp_path / "w.pth")
    given = ("--data", image_tree, "--backbone", "digits_cnn", "--weights", tmp_path / "w.pth", *SMALL)
    outcome = qtdog("train", *given, "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err


def test_eval_says_nothing_of_training(qtdog: Any, image_tree: Path, tmp_path: Path):
    assert qtdog("train", "--data", image_tree, *NET, "-o", tmp_path / "run").code == 0
    for name in ("8.png", "9.png"):
        (image_tree / "indoor" / "cat" / name).write_text("no image")
    told = qtdog("eval", tmp_path / "run", "--data", image_tree)
    assert told.code == 1
    assert "2 images cannot be read" in told.err
    assert "trained" not in told.err


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [("averager.name: swda", "swa"), ("quantizer.name: lsqq", "lsq"), ("objective.name: coraal", "coral")],
)
def test_a_dry_run_checks_a_study_as_the_sweep_does(qtdog: Any, tmp_path: Path, setting: str, nearest: str):
    key, _, value = setting.partition(": ")
    told = qtdog("sweep", study(tmp_path, methods={"a": {"set": {key: value}}}), "--dry-run", "-o", tmp_path / "runs")
    assert told.code == 2
    assert f"did you mean '{nearest}'" in told.err


def test_seeds_suggests_seed(qtdog: Any, tmp_path: Path):
    told = qtdog("sweep", study(tmp_path, grid={"target": ["75"], "seeds": [0]}), "--dry-run", "-o", tmp_path / "runs")
    assert "did you mean 'seed'" in told.err


def test_a_dry_run_for_slurm_needs_no_gpu_here(qtdog: Any, tmp_path: Path):
    told = qtdog("sweep", study(tmp_path), "--engine", "slurm", "--gpus", 1, "--dry-run", "-o", tmp_path / "runs")
    assert told.code == 0, told.err
    assert "gpus_per_node=1" in told.out
    assert "-0%" not in told.out


def test_names_of_domains_are_text(qtdog: Any, tmp_path: Path):
    for domain in ("NO", "010", "x"):
        for name in ("cat", "dog"):
            (tmp_path / "places" / domain / name).mkdir(parents=True)
            for i in range(5):
                color = (40 * i, len(domain), 9)
                Image.new("RGB", (12, 12), color).save(tmp_path / "places" / domain / name / f"{i}.png")
    for target in ("NO", "010"):
        (tmp_path / "p.yaml").write_text(f"data: {{target: {target}}}\n")
        for words in (("--preset", tmp_path / "p.yaml"), ("--set", f"data.target={target}"), ("--target", target)):
            shown = qtdog("train", "--data", tmp_path / "places", *words, *NET, "--dry-run").out
            assert f"target: '{target}'" in shown


def test_names_of_a_study_stand_in_every_table(qtdog: Any, tmp_path: Path):
    methods = {"ERM": {"presets": ["float"]}, "QT-DoG": {"presets": ["lsq"]}}
    file, runs = study(tmp_path, methods=methods), tmp_path / "runs"
    plan = make_plan(read_study(file))
    save_labels(plan.study.name, plan.labels, runs)
    assert {run_task(task, runs, plan.dataset, RunCallbacks()).status for task in plan.tasks} == {"done"}
    for kind in ("text", "markdown", "latex", "csv", "json"):
        shown = qtdog("sweep", "table", file, "--runs", runs, "--format", kind).out
        assert "ERM" in shown
        assert "QT-DoG" in shown
    assert qtdog("sweep", "table", file, "--runs", runs, "-o", tmp_path / "t.tex").out == ""
    assert r"\resizebox{\ifdim\width>\linewidth\linewidth" in (tmp_path / "t.tex").read_text()
    for words in (("table", runs), ("runs", "--runs", runs)):
        assert "QT-DoG" in qtdog(*words).out
    assert qtdog("report", runs, "-o", tmp_path / "page.html").code == 0
    assert "QT-DoG" in (tmp_path / "page.html").read_text()
    assert "erm + lsq" not in (tmp_path / "page.html").read_text()


def test_a_card_of_many_classes_keeps_every_number(qtdog: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for domain in ("day", "night"):
        for c in range(30):
            folder = tmp_path / "many" / domain / f"class-with-a-name-{c:02d}"
            folder.mkdir(parents=True)
            for i in range(1 + c % 2):
                Image.new("RGB", (8, 8), (c, i, 3)).save(folder / f"{i}.png")
    monkeypatch.setenv("COLUMNS", "80")
    lines = qtdog("data", "card", tmp_path / "many").out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("class-with")}
    assert len(rows) == 30
    assert all(rows[f"class-with-a-name-{c:02d}"] == [str(1 + c % 2)] * 2 for c in range(30))
