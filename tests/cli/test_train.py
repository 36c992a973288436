"""`qtdog train` on the command line: what it says before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
