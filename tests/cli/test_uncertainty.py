"""What `predict` and `eval` say of uncertainty, for an ensemble and for one model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from qtdog.data.known_datasets import RotatedDigits
from qtdog.ensemble.model import load
from qtdog.ensemble.prediction import member_logits, predict_from_logits
from qtdog.ensemble.scoring import reliability
from qtdog.packing.ensemble_file import load_ensemble, save_ensemble
from qtdog.training.calibration import fit_temperature
from qtdog.training.load_model import load_model

SHORT = ("--steps", 30, "--image-size", 12, "--set", "data.batch_size=8", "--set", "train.eval_every=15")


@pytest.fixture(scope="module")
def trained(stdout_of, tmp_path_factory):
    out = tmp_path_factory.mktemp("members") / "two"
    words = ("train", "--target", "75", *SHORT, "--members", "2", "--out", out, "--json")
    return out, json.loads(stdout_of(*words))["ensembles"][0]


@pytest.fixture
def pictures(tmp_path):
    digits = RotatedDigits()
    for i, index in enumerate(digits.indices("75")[:20]):
        Image.fromarray(digits.read(int(index))[..., 0]).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def test_the_temperature_is_fitted_on_the_sources_and_travels_in_the_file(trained):
    folder, result = trained
    model = load(folder / "75-eoq" / "model.safetensors")
    calibration = result["calibration"]
    assert model.info.temperature == calibration["temperature"] != 1  # pyright: ignore
    from qtdog.ensemble.model import read_member
    from qtdog.ensemble.scoring import open_evaluation_set

    members = [read_member(path) for path in sorted(folder.glob("75-seed*"))]
    evaluation_set = open_evaluation_set(members[0].config, RotatedDigits(), same_splits=True)
    kept = []
    evaluation_set.source(lambda images: member_logits(model, images), kept)
    logits, labels = torch.cat([part.logits for part in kept], 1), torch.cat([part.labels for part in kept])
    assert fit_temperature(logits.mean(0), labels) == pytest.approx(calibration["temperature"], rel=1e-4)
    again = reliability(predict_from_logits(logits, calibration["temperature"]), labels)
    assert again.ece == pytest.approx(calibration["source"]["after"]["ece"], abs=1e-6)
    assert set(calibration["test"]["before"]) == {"ece", "brier", "aurc", "risk_at_90"}


def test_predict_gives_the_uncertainty_of_an_ensemble(qtdog, trained, pictures):
    folder, _ = trained
    rows = json.loads(qtdog("predict", folder / "75-eoq" / "model.safetensors", pictures, "--json").out)
    assert set(rows[0]) == {"image", "class", "probability", "entropy", "mutual_information", "agreement"}
    model = load(folder / "75-eoq" / "model.safetensors")
    with Image.open(rows[3]["image"]) as picture:
        pixels = torch.from_numpy(np.asarray(picture.resize((12, 12)))[None, :, :, None].copy())
    assert rows[3]["agreement"] in (0.5, 1.0)
    assert model.probabilities(pixels).shape == (1, 10)


def test_predict_of_one_model_has_its_entropy_only(qtdog, trained, pictures):
    folder, _ = trained
    file = folder / "75-seed0" / "model.safetensors"
    rows = json.loads(qtdog("predict", file, pictures, "--json").out)
    assert set(rows[0]) == {"image", "class", "probability", "entropy"}
    shipped = load_model(file)
    from pathlib import Path

    from qtdog.data.decode import decode_resized

    pixels = torch.from_numpy(decode_resized(Path(rows[0]["image"]), 12, 1).copy())[None]
    p = shipped.probabilities(pixels)[0]
    assert rows[0]["entropy"] == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
    assert rows[0]["probability"] == pytest.approx(p.max().item(), rel=1e-5)


def test_reject_abstains_on_the_least_certain(qtdog, trained, pictures):
    folder, _ = trained
    file = folder / "75-eoq" / "model.safetensors"
    outcome = qtdog("predict", file, pictures, "--reject", 0.1, "--json")
    rows = json.loads(outcome.out)
    assert "abstained on 2 of 20" in outcome.err
    rejected = [row for row in rows if row["rejected"]]
    assert len(rejected) == 2
    assert all(row["class"] == "" for row in rejected)
    kept = [row["entropy"] for row in rows if not row["rejected"]]
    assert min(row["entropy"] for row in rejected) >= max(kept)
    assert qtdog("predict", file, pictures, "--reject", 1.5).code == 2
    table = qtdog("predict", file, pictures, "--reject", 0.1, "--format", "csv").out
    assert table.splitlines()[0] == "image,class,probability,entropy,mutual_information,agreement,rejected"


def test_eval_says_how_far_to_trust(qtdog, trained, pictures):
    folder, result = trained
    file = folder / "75-eoq" / "model.safetensors"
    told = json.loads(qtdog("eval", file, "rotated-digits", "--unknown", pictures, "--json").out)
    assert told["domains"]["75"]["ece"] == pytest.approx(result["calibration"]["test"]["after"]["ece"], abs=1e-6)
    assert told["domains"]["75"]["accuracy"] == result["test_accuracy"]
    assert 0 <= told["unknown_auroc_entropy"] <= 1
    assert 0 <= told["unknown_auroc_mutual_information"] <= 1
    assert "ECE" in qtdog("eval", file, "rotated-digits").out
    missing = qtdog("eval", file, "rotated-digits", "--unknown", pictures / "nowhere")
    assert missing.code == 1
    assert "nowhere" in missing.err


def test_options_of_the_cascade_say_what_to_use_instead(qtdog, trained, pictures, tmp_path):
    folder, _ = trained
    file = folder / "75-eoq" / "model.safetensors"
    for words in (
        ("predict", file, pictures, "--cascade"),
        ("eval", file, "rotated-digits", "--cascade"),
        ("export", file, "-o", tmp_path / "m.onnx", "--cascade"),
        ("ensemble", folder / "75-seed0", "-o", tmp_path / "e", "--cascade-loss", "0.5"),
        ("ensemble", folder / "75-seed0", "-o", tmp_path / "e", "--cascade-loss=0.5"),
    ):
        refused = qtdog(*words)
        assert refused.code == 2
        assert "qtdog distill" in refused.err
        assert "--threshold auto" in refused.err


def test_an_ensemble_with_the_threshold_of_a_cascade_asks_all_members(qtdog, trained, pictures, tmp_path):
    folder, _ = trained
    file = folder / "75-eoq" / "model.safetensors"
    whole = load_ensemble(file)
    save_ensemble(tmp_path / "model.safetensors", whole.members, whole.about | {"cascade_threshold": 0.3})
    found, expected = (json.loads(qtdog("predict", one, pictures, "--json").out) for one in (tmp_path, file))
    assert found == expected


def test_predict_accepts_what_reaches_the_threshold_of_the_file(qtdog, trained, pictures):
    folder, _ = trained
    for name in ("75-seed0", "75-eoq"):
        file = folder / name / "model.safetensors"
        threshold = load(file).info.accept_threshold
        assert threshold is not None
        found = qtdog("predict", file, pictures, "--threshold", "auto", "--json")
        rows = json.loads(found.out)
        assert [row["accepted"] for row in rows] == [row["probability"] >= threshold for row in rows]
        assert f"accepted {sum(row['accepted'] for row in rows)} of 20" in found.err
    rows = json.loads(qtdog("predict", file, pictures, "--threshold", "0.0", "--json").out)
    assert all(row["accepted"] for row in rows)
    assert "'auto' or a probability" in qtdog("predict", file, pictures, "--threshold", "high").err
