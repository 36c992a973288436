"""`qtdog train` on the command line: what it says before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtdog.cli.predict import show_worst_classes


def test_a_dry_run_shows_plan_configuration_and_estimate_and_writes_nothing(qtdog: Any, tmp_path: Path):
    words = ["train", "--target", "75", "--preset", "lsq", "--steps", "4", "--batch-size", "4", "--image-size", "12"]
    words += ["--members", "2", "-o", tmp_path / "runs", "--dry-run"]
    shown = qtdog(*words)
    assert shown.code == 0
    assert "backbone: digits_cnn" in shown.out
    assert f"75         1  new    {tmp_path}/runs/75-seed1" in shown.out
    assert "2 to train: about" in shown.out
    assert not (tmp_path / "runs").exists()
    tree = json.loads(qtdog(*words, "--json").out)
    assert [run["seed"] for run in tree["runs"]] == [0, 1]
    assert tree["config"]["train"]["steps"] == 4
    assert tree["estimate"]["seconds"] > 0


def test_the_end_of_training_says_how_sure_each_accuracy_is_and_where_the_model_errs(qtdog: Any, tmp_path: Path):
    words = ["train", "--target", "75", "--preset", "lsq", "--steps", "4", "--batch-size", "4", "--image-size", "12"]
    words += ["--members", "2", "-o", tmp_path / "runs"]
    shown = qtdog(*words)
    assert shown.code == 0
    runs = [json.loads((tmp_path / "runs" / f"75-seed{seed}" / "result.json").read_text()) for seed in (0, 1)]
    ensemble = json.loads(next((tmp_path / "runs").glob("75-eoq/result.json")).read_text())
    for result in (*runs, ensemble):
        rows = result["classes"]["test"]["75"]
        n, right = (sum(row[key] for row in rows) for key in ("n", "right"))
        assert n == 299
        assert right / n == result["test_accuracy"]
        assert all(row["n"] == row["right"] + sum(row["called"].values()) for row in rows)
    kept = runs[0]["scores"]["source"]
    for domain, rows in runs[0]["classes"]["source"].items():
        n, right = (sum(row[key] for row in rows) for key in ("n", "right"))
        assert (n, right / n) == (kept[domain]["n"], kept[domain]["accuracy"])
    curve = runs[0]["calibration"]["test"]["risk_coverage"]
    assert curve[-1] == [1.0, 1 - runs[0]["test_accuracy"]]
    accuracy = f"{100 * ensemble['test_accuracy']:.1f}"
    assert any(line.split()[:3] == ["75", "unseen", accuracy] for line in shown.out.splitlines())
    assert "where it errs most: 5 of" in shown.out
    alone = qtdog("train", "--resume", "-o", tmp_path / "runs" / "75-seed0").out
    assert sum("  validation images  " in line for line in alone.splitlines()) == 5


def test_one_wrong_image_makes_no_worst_class(capsys: pytest.CaptureFixture[str]):
    rare = {"class": "rare", "n": 1, "right": 0, "called": {"common": 1}}
    common = {"class": "common", "n": 100, "right": 40, "called": {"rare": 60}}
    show_worst_classes({"site": [rare, common]})
    first, second = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("site")]
    assert (first, second) == ("common", "rare")
