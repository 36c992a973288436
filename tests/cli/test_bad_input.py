"""Every mistake that a user can make gets a message that says what to do, and a non-zero exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

SHORT = ("--steps", 2, "--batch-size", 2, "--image-size", 12, "--set", "train.eval_every=1")
NET = ("--backbone", "digits_cnn", "--weights", "none", *SHORT)


def test_path_missing_names_the_sibling(qtdog, image_tree):
    outcome = qtdog("train", "--data", image_tree.parent / "photo", "--target", "night")
    assert outcome.code == 1
    assert "photo does not exist" in outcome.err
    assert "photos" in outcome.err


def test_no_domains(qtdog, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = qtdog("train", "--data", tmp_path / "empty", "--target", "a")
    assert outcome.code == 1
    assert "DOMAIN/CLASS" in outcome.err


def test_one_domain_only(qtdog, image_tree):
    for domain in ("indoor", "night"):
        shutil.rmtree(image_tree / domain)
    outcome = qtdog("train", "--data", image_tree, "--target", "outdoor", *NET)
    assert outcome.code == 1
    assert "one domain (outdoor)" in outcome.err


def test_target_is_no_domain(qtdog, image_tree):
    outcome = qtdog("train", "--data", image_tree, "--target", "nigth", *NET)
    assert outcome.code == 2
    assert "unknown target domain 'nigth'; did you mean 'night'?" in outcome.err


def test_truncated_image_is_named(qtdog, image_tree, tmp_path):
    path = image_tree / "night" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:300])
    outcome = qtdog("train", "--data", image_tree, "--target", "night", *NET, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert str(path) in outcome.err
    assert "qtdog data verify" in outcome.err


def test_class_missing_in_a_domain_is_refused_unless_allowed(qtdog, image_tree, tmp_path):
    shutil.rmtree(image_tree / "night" / "dog")
    args = ("train", "--data", image_tree, "--target", "indoor", *NET, "--out", tmp_path / "run")
    outcome = qtdog(*args)
    assert outcome.code == 1
    assert "'dog' in domain 'night'" in outcome.err
    assert "data.allow_missing_classes=true" in outcome.err
    assert qtdog(*args, "--set", "data.allow_missing_classes=true").code == 0


def test_unknown_backbone(qtdog, image_tree, tmp_path):
    outcome = qtdog(
        "train", "--data", image_tree, "--target", "night", "--backbone", "resnet5O", "--out", tmp_path / "r"
    )
    assert outcome.code == 1
    assert "did you mean 'resnet50" in outcome.err


def test_weights_of_the_wrong_shape(qtdog, image_tree, tmp_path):
    from qtdog.models.network import FeaturizerSpec, build_featurizer

    state = build_featurizer(FeaturizerSpec("digits_cnn", 3, 12)).state_dict()
    name = next(iter(state))
    save_file(state | {name: torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    args = ("--backbone", "digits_cnn", "--weights", tmp_path / "w.safetensors", *SHORT, "--out", tmp_path / "r")
    outcome = qtdog("train", "--data", image_tree, "--target", "night", *args)
    assert outcome.code == 1
    assert name in outcome.err
    assert "(3, 3)" in outcome.err


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(qtdog, bits):
    outcome = qtdog("train", "--bits", bits)
    assert outcome.code == 2
    assert "quantizer.bits" in outcome.err
    assert f"(got {bits})" in outcome.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--set", "quantizer.bit=3"), "unknown option in 'quantizer' 'bit'; did you mean 'bits'?"),
        (("--set", "quantiser.bits=3"), "did you mean 'quantizer'?"),
        (("--preset", "digit"), "did you mean 'digits'?"),
        (("--data", "rotated_digits"), "did you mean 'rotated-digits'?"),
        (("--objective", "corall", "--steps", 2), "unknown objective 'corall'"),
        (("--stepz", 3), "No such option: --stepz"),
        (("--members", 0), "--members"),
    ],
)
def test_unknown_names(qtdog, args, message, tmp_path):
    outcome = qtdog("train", *args, "--out", tmp_path / "run")
    assert outcome.code != 0
    assert message in outcome.err


def test_learning_rate_that_explodes_stops_with_advice(qtdog, tmp_path):
    args = (
        "--lr",
        9,
        "--set",
        "optimizer.name=sgd",
        "--set",
        "data.batch_size=16",
        "--steps",
        60,
        "--quantizer",
        "none",
    )
    outcome = qtdog("train", "--target", "75", *args, "--out", tmp_path / "run")
    if outcome.code == 0:  # group norm can bring even this back; then the loss was finite all along
        pytest.fail("expected the loss to become NaN with a learning rate of 9")
    assert "the training loss became" in outcome.err
    assert "--lr" in outcome.err


def test_resume_without_a_run(qtdog, tmp_path):
    outcome = qtdog("train", "--resume", "--out", tmp_path / "nothing")
    assert outcome.code == 2
    assert "there is no run in" in outcome.err


@pytest.fixture
def model_file(qtdog, tmp_path) -> Path:
    assert qtdog("train", "--target", "75", *SHORT, "--out", tmp_path / "run").code == 0
    return tmp_path / "run" / "model.safetensors"


def test_wrong_model_files(qtdog, model_file, tmp_path):
    image = tmp_path / "image.png"
    Image.new("L", (9, 9)).save(image)
    broken = tmp_path / "broken.safetensors"
    content = model_file.read_bytes()
    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.zeros(2)}, plain)
    for bad in (content[: len(content) // 2], b"", b"\xff" * 64, b"PK\x03\x04" + content):
        broken.write_bytes(bad)
        outcome = qtdog("predict", broken, image)
        assert outcome.code == 1
        assert "broken.safetensors" in outcome.err
    for path in (plain, tmp_path / "none.safetensors"):
        outcome = qtdog("predict", path, image)
        assert outcome.code == 1
        assert path.name in outcome.err


def test_predict_names_a_broken_image_and_still_predicts_the_rest(qtdog, model_file, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (30, 20), 200).save(folder / name)
    (folder / "c.png").write_bytes(b"not an image")
    outcome = qtdog("predict", model_file, folder, "--json")
    assert outcome.code == 1
    assert "c.png" in outcome.err
    assert "1 of 3 images" in outcome.err
    assert [Path(row["image"]).name for row in json.loads(outcome.out)] == ["a.png", "b.png"]
    outcome = qtdog("predict", model_file, tmp_path / "nowhere")
    assert outcome.code == 1
    assert "does not exist" in outcome.err


def test_eval_refuses_classes_that_the_model_does_not_know(qtdog, model_file, image_tree):
    outcome = qtdog("eval", model_file, image_tree)
    assert outcome.code == 1
    assert "channels" in outcome.err or "does not know class" in outcome.err


def test_an_exported_file_is_no_model_of_ours(qtdog, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    for words in (("predict", tmp_path / "model.onnx", tmp_path), ("eval", tmp_path / "model.onnx")):
        outcome = qtdog(*words)
        assert outcome.code == 1
        assert "is an exported file, which other programs run; give the packed file" in outcome.err
