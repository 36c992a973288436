"""From an ensemble to one student, as a user does it."""

from __future__ import annotations

import json

import pytest
import yaml

from qtdog.training.load_model import load_model

SHORT = ("--steps", 6, "--set", "train.eval_every=3", "--set", "data.batch_size=4")


@pytest.fixture(scope="module")
def teacher(stdout_of, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    stdout_of("train", "--target", "75", "--image-size", "12", *SHORT, "--out", out / "run")
    return out / "run" / "model.safetensors"


def test_a_student_is_trained_shipped_and_resumed(qtdog, teacher, tmp_path):
    words = ("distill", teacher, "--data", "rotated-digits", *SHORT, "--bits", 5, "--out", tmp_path / "s", "--json")
    outcome = qtdog(*words)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["target_domain"] == "75"
    assert result["layers"][0]["bits"] == 5
    assert load_model(tmp_path / "s" / "model.safetensors").info.preprocessing.image_size == 12
    saved = yaml.safe_load((tmp_path / "s" / "config.yaml").read_text())["objective"]
    assert len(saved["teacher_sha256"]) == 64
    (tmp_path / "s" / "result.json").unlink()
    again = qtdog("train", "--resume", "--out", tmp_path / "s", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["model_sha256"] == result["model_sha256"]


def test_a_student_of_another_weight_is_another_run(qtdog, teacher, tmp_path):
    hashes = []
    for weight in (0.0, 0.9):
        words = ("distill", teacher, *SHORT, "--weight", weight, "--out", tmp_path / str(weight), "--json")
        hashes.append(json.loads(qtdog(*words).out)["model_sha256"])
    assert hashes[0] != hashes[1]


def test_a_teacher_that_knows_the_unseen_domain_is_refused(qtdog, teacher, tmp_path):
    outcome = qtdog("distill", teacher, "--target", "15", *SHORT, "--out", tmp_path / "s")
    assert outcome.code == 2
    assert "was trained on '15'" in outcome.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.image_size=16", "must see the same input"),
        ("objective.name=mixup", "runs the model itself"),
        ("objective.teacher=nowhere.safetensors", "is not a file"),
    ],
)
def test_mistakes(qtdog, teacher, tmp_path, change, message):
    outcome = qtdog("distill", teacher, *SHORT, "--set", change, "--out", tmp_path / "s")
    assert outcome.code == 2, outcome.err
    assert message in outcome.err


NAMED = {"teacher_weights": "none", "teacher_image_size": 20, "teacher_mode": "cosine"}


def test_the_command_takes_the_name_of_a_backbone(qtdog, tmp_path):
    words = ("distill", "--teacher", "digits_cnn", "--target", "75", "--data", "rotated-digits", "--steps", 4)
    sets = [f"objective.{key}={value}" for key, value in NAMED.items()]
    sets += ["train.eval_every=2", "data.batch_size=4", "data.image_size=12"]
    options = [word for text in sets for word in ("--set", text)]
    outcome = qtdog(*words, *options, "--out", tmp_path / "student", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["target_domain"] == "75"
    neither = qtdog("distill", "--target", "75")
    assert "give one teacher" in neither.err
