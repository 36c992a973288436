"""Branches that are merged, as a user asks for them."""

from __future__ import annotations

import json

import pytest
import yaml

SHORT = ("--target", 75, "--steps", 6, "--set", "train.eval_every=3", "--set", "data.batch_size=4")


def test_a_branch_for_each_source_domain_and_one_file(qtdog, tmp_path):
    words = ("dart", *SHORT, "--set", "data.image_size=12", "--merge-every", 3, "--out", tmp_path / "d", "--json")
    outcome = qtdog(*words)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["dart"]["n_branches"] == 5
    assert result["training_steps"] == 30
    plans = [yaml.safe_load(file.read_text()) for file in sorted((tmp_path / "d").glob("branch-*/config.yaml"))]
    assert [plan["data"]["focus"] for plan in plans] == ["0", "15", "30", "45", "60"]
    assert (tmp_path / "d" / "model.safetensors").is_file()
    again = qtdog(*words, "--resume")
    assert json.loads(again.out)["model_sha256"] == result["model_sha256"]


def test_branches_as_the_user_names_them(qtdog, tmp_path):
    own = ("--branch", "data.augment=none", "--branch", "objective.name=coral;train.seed=7")
    words = ("dart", *SHORT, *own, "--set", "data.image_size=12", "--out", tmp_path / "d")
    outcome = qtdog(*words)
    assert outcome.code == 0, outcome.err
    assert "dart" in outcome.out
    plan = yaml.safe_load((tmp_path / "d" / "branch-1" / "config.yaml").read_text())
    assert (plan["objective"]["name"], plan["train"]["seed"]) == ("coral", 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--branch", "data.focus=75"), "unknown source domain for data.focus '75'"),
        (("--branch", "data.image_size=16", "--branch", "train.seed=1"), "cannot be merged"),
        (("--target", "all"), "one --target at a time"),
    ],
)
def test_branches_that_cannot_be_are_refused(qtdog, tmp_path, change, message):
    outcome = qtdog("dart", *SHORT, *change, "--out", tmp_path / "d")
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
