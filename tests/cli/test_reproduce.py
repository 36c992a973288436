"""`qtdog reproduce`, on a table of the paper with a tiny network and a tiny data set in the place of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from qtdog.api.paper import Cost, PaperRow, lines_of, value_of
from qtdog.models.flops import training_flops

TINY = {"model.backbone": "digits_cnn", "model.weights": "none", "data.image_size": 12, "data.batch_size": 2}
TINY |= {"train.steps": 4, "train.eval_every": 2, "quantizer.start_step": 2}


def arguments(tree: Path, out: Path, *more: str) -> list[str]:
    changes = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    return ["reproduce", "table01", "--dataset", "PACS", "--data", str(tree), "--out", str(out), *changes, *more]


def test_missing_runs_are_made_once_and_stand_beside_the_paper(qtdog: Any, image_tree: Path, tmp_path: Path):
    chosen = ["--only", "ERM", "--only", "QT-DoG", "--only", "DiWA", "--trials", "1"]
    call = arguments(image_tree, tmp_path / "out", *chosen)
    before = json.loads(qtdog(*call, "--dry-run", "--json").out)
    assert not (tmp_path / "out").exists()
    assert [run["done"] for run in before["runs"]] == [False] * 6
    assert before["missing"]["n_runs"] == 6
    assert before["missing"]["n_images"] == 6 * 4 * 2 * 2  # steps, batch, sources

    made = qtdog(*call, "--json")
    told = json.loads(made.out)
    assert "is not pacs: ours is not a reproduction" in made.err
    erm, ours, diwa = told["lines"]
    results = [json.loads((Path(run["folder"]) / "result.json").read_text()) for run in told["runs"]]
    assert {run["method"] for run in told["runs"]} == {"ERM", "QT-DoG"}
    for line, part in ((erm, results[:3]), (ours, results[3:])):
        values = [100 * next(iter(result["test_accuracy_80"].values())) for result in part]
        assert line["ours"] == pytest.approx(sum(values) / 3)
        assert line["difference"] == pytest.approx(line["ours"] - line["paper"])
    assert (erm["paper"], ours["paper"]) == (84.7, 87.8)
    assert (diwa["ours"], diwa["told"][:19]) == (None, "the mean of 60 runs")

    changed = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("result.json"))]
    again = qtdog(*call)
    assert "3 of 3 runs" in again.out
    assert changed == [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("result.json"))]


def test_members_of_an_ensemble_are_the_trials_of_the_single_model(qtdog: Any, image_tree: Path, tmp_path: Path):
    few = ["--set", "data.target=night"]
    call = arguments(image_tree, tmp_path / "out", *few, "--only", "QT-DoG", "--only", "EoQ", "--trials", "2")
    runs = json.loads(qtdog(*call, "--dry-run", "--json").out)["runs"]
    assert len(runs) == 2 + 5
    assert len({run["folder"] for run in runs}) == 5
    told = json.loads(qtdog(*call, "--json").out)
    single, ensemble = told["lines"]
    assert single["error"] is not None
    assert ensemble["told"] == "1 of 1 ensembles of 5"
    kept = json.loads(next((tmp_path / "out" / "ensembles").rglob("result.json")).read_text())
    assert ensemble["ours"] == pytest.approx(100 * kept["test_accuracy"])


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


def test_a_trial_counts_when_all_its_targets_are_there():
    row = PaperRow(method="m", values={"unseen": 50.0, "unseen/a": 40.0})
    trials = [{"a": {"test_accuracy": 0.5}, "b": {"test_accuracy": 0.7}}, {"a": {"test_accuracy": 0.1}}]
    mean, one = lines_of(row, trials, n_targets=2)
    assert (mean.ours, mean.error, mean.told) == (pytest.approx(60), None, "3 of 4 runs")
    assert one.ours == pytest.approx(30)
    assert one.error == pytest.approx(20 / 2**0.5)  # DomainBed's: the population standard deviation, 20, over √n
    assert one.difference == pytest.approx(-10)


def test_a_mean_of_five_data_sets_is_not_compared_with_one():
    row = PaperRow(method="m", values={"mean_of_five": 70.0})
    (line,) = lines_of(row, [{"a": {"test_accuracy": 0.5}}], n_targets=1)
    assert (line.ours, line.difference) == (50.0, None)


def test_single_models_are_measured_on_the_published_part_and_ensembles_on_all():
    result = {"test_accuracy": 0.5, "test_accuracy_80": {"sketch": 0.25}, "source_accuracy": 0.9}
    assert value_of(result, "unseen") == 0.25
    assert value_of(result | {"members": []}, "unseen") == 0.5
    assert value_of(result, "source") == 0.9
    assert value_of({"test_accuracy": 0.5, "test_accuracy_80": {}}, "in_domain") == 0.5


def test_arithmetic_is_counted():
    assert training_flops("resnet50", channels=3, size=224) == pytest.approx(3 * 2 * 4.09e9, rel=0.01)
    text = training_flops("distilbert-base-uncased", channels=3, size=100)
    assert text == pytest.approx(3 * 2 * 100 * 42.5e6, rel=0.01)  # 66.4 M weights without 23.8 M of words
    assert Cost(1, 1, 3.6e15).hours(1) == pytest.approx(1.0)
