"""`qtdog reproduce`, on a table of the paper with a tiny network and a tiny data set in the place of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from qtdog.api.studies import find_study, narrow
from qtdog.core.config_io import parse_assignment
from qtdog.sweep.local import run_task
from qtdog.sweep.plan import make_plan
from qtdog.sweep.results import expected_rows
from qtdog.training.run import RunCallbacks

TINY = {"model.backbone": "digits_cnn", "model.weights": "none", "data.image_size": 12, "data.batch_size": 2}
TINY |= {"train.steps": 4, "train.eval_every": 2, "quantizer.start_step": 2}


def arguments(tree: Path, out: Path, *more: str) -> list[str]:
    changes = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    return ["reproduce", "table01", "--dataset", "PACS", "--data", str(tree), "--out", str(out), *changes, *more]


def make_runs(tree: Path, out: Path, *methods: str) -> None:
    """Make the runs of some methods of the table in this process, with their target "night"."""
    study, _ = find_study("table01", "PACS")
    changes = [parse_assignment(f"{key}={value}") for key, value in {**TINY, "data.target": "night"}.items()]
    plan = make_plan(narrow(study, expected_rows(study, methods), 1, changes), str(tree))
    for task in plan.tasks:
        assert run_task(task, out, plan.dataset, RunCallbacks(warn=print)).status == "done"


def test_finished_runs_stand_beside_the_paper_and_are_not_made_again(qtdog: Any, image_tree: Path, tmp_path: Path):
    chosen = ["--only", "ERM", "--only", "QT-DoG", "--only", "DiWA", "--trials", "1", "--set", "data.target=night"]
    call = arguments(image_tree, tmp_path / "out", *chosen)
    before = json.loads(qtdog(*call, "--dry-run", "--json").out)
    assert not (tmp_path / "out").exists()
    assert [run["done"] for run in before["runs"]] == [False] * 2
    assert before["missing"]["n_runs"] == 2
    assert before["missing"]["n_images"] == 2 * 4 * 2 * 2  # runs, steps, batch, sources

    make_runs(image_tree, tmp_path / "out", "ERM", "QT-DoG")
    compared = qtdog(*call, "--json", "--workers", "1")
    found = json.loads(compared.out)
    assert "is not pacs: ours is not a reproduction" in compared.err
    erm, ours, diwa = found["lines"]
    assert [run["method"] for run in found["runs"]] == ["ERM", "QT-DoG"]
    for line, run in zip((erm, ours), found["runs"], strict=True):
        result = json.loads((Path(run["folder"]) / "result.json").read_text())
        assert line["ours"] == pytest.approx(100 * result["test_accuracy_80"]["night"])
        assert line["difference"] == pytest.approx(line["ours"] - line["expected"])
    assert (erm["expected"], ours["expected"]) == (84.7, 87.8)
    assert (diwa["ours"], diwa["source"][:19]) == (None, "the mean of 60 runs")

    changed = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("result.json"))]
    again = qtdog(*call)
    assert "1 of 1 runs" in again.out
    assert changed == [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("result.json"))]


def test_members_of_an_ensemble_are_the_trials_of_the_single_model(qtdog: Any, image_tree: Path, tmp_path: Path):
    few = ["--set", "data.target=night"]
    call = arguments(image_tree, tmp_path / "out", *few, "--only", "QT-DoG", "--only", "EoQ", "--trials", "2")
    runs = json.loads(qtdog(*call, "--dry-run", "--json").out)["runs"]
    assert len(runs) == 2 + 5
    assert len({run["folder"] for run in runs}) == 5


def test_without_the_data_the_runs_are_only_counted(qtdog: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("QTDOG_DATA", str(tmp_path))
    outcome = qtdog("reproduce", "scale", "--dry-run", "--trials", "1")
    assert outcome.code == 0
    assert "8 of 8 runs are missing: 3,840,000 images" in outcome.out
    assert "The data is not here" in outcome.out.replace("\n", " ")
    refused = qtdog("reproduce", "scale", "--trials", "1")
    assert refused.code == 1
    assert "pacs" in refused.err


def test_the_list_of_tables_and_wrong_names(qtdog: Any):
    listed = json.loads(qtdog("reproduce", "--json").out)
    assert ("table01", "VLCS") in {(table["study"], table["dataset"]) for table in listed}
    assert "table15" in qtdog("reproduce").out
    for words, message in ((["tabel01"], "did you mean 'table01'"), (["table01"], "add --dataset")):
        outcome = qtdog("reproduce", *words)
        assert outcome.code == 2
        assert message in outcome.err
