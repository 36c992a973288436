"""The commands as a user has them, end to end on small data."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from qtdog.data.corruptions import corrupt
from qtdog.data.decoded_cache import open_cache
from qtdog.data.open import open_dataset
from qtdog.packing.packed_file import load_packed, save_packed
from qtdog.training.load_model import load_model

SHORT = ("--steps", 4, "--batch-size", 4, "--image-size", 16, "--set", "train.eval_every=2")
NET = ("--backbone", "digits_cnn", "--weights", "none", *SHORT)


@pytest.fixture(scope="module")
def model(stdout_of, tmp_path_factory):
    """Train one small model on a tree of images through the command line."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for domain in ("day", "night", "x"):
        for c, name in enumerate(("cat", "dog")):
            (root / domain / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 90, (20, 24, 3))
                pixels[..., c] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / domain / name / f"{i}.png")
    out = root.parent / "run"
    words = ("train", "--data", root, "--target", "x", *NET, "--out", out, "--json")
    return root, out, json.loads(stdout_of(*words))


def test_train_prints_json_and_fills_the_run_folder(model):
    root, out, result = model
    assert result["target_domain"] == "x"
    assert (out / "model.safetensors").stat().st_size == result["size"]["bytes"]
    assert result["folder"] == str(out)
    assert root.name == result["dataset"]


def test_eval_gives_the_accuracy_that_training_gave(qtdog, model):
    root, out, result = model
    outcome = qtdog("eval", out / "model.safetensors", root, "--json")
    assert outcome.code == 0
    domains = json.loads(outcome.out)["domains"]
    assert domains["x"]["accuracy"] == result["test_accuracy"]
    assert domains["x"]["n"] == 12
    table = qtdog("eval", out / "model.safetensors", root)
    assert "day (trained on)" in table.out


def test_eval_under_corruption_scores_the_corrupted_images(qtdog, model):
    root, out, _ = model
    asked = ("--corrupt", "noise", "--corrupt", "jpeg", "--severity", 2, "--severity", 5)
    outcome = qtdog("eval", out / "model.safetensors", root, *asked, "--json")
    rows = json.loads(outcome.out)["corruptions"]
    assert len(rows) == 4 * 2 * 3
    loaded, dataset = load_model(out / "model.safetensors"), open_dataset(str(root))
    for row in rows:
        keys = dataset.indices(row["domain"])
        images = open_cache(dataset, 16).gather(keys).permute(0, 3, 1, 2)
        corrupted = corrupt(images, row["corruption"], row["severity"], keys=list(keys)).permute(0, 2, 3, 1)
        right = loaded.probabilities(corrupted).argmax(1).numpy() == dataset.class_index[keys]
        assert row["accuracy"] == right.mean()
        assert row["n"] == len(keys)
    table = qtdog("eval", out / "model.safetensors", root, *asked)
    assert "gaussian_noise" in table.out
    assert "severities 2, 5" in table.out


def test_eval_names_the_nearest_corruption(qtdog, model):
    root, out, _ = model
    outcome = qtdog("eval", out / "model.safetensors", root, "--corrupt", "jpg")
    assert outcome.code != 0
    assert "jpeg" in outcome.err


@pytest.mark.stress
def test_predict_in_a_fresh_process_gives_the_loaded_models_numbers(model):
    root, out, _ = model
    command = [sys.executable, "-m", "qtdog", "predict", str(out / "model.safetensors"), str(root / "x"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    shipped = load_model(out / "model.safetensors")
    dataset = open_dataset(str(root))
    images = open_cache(dataset, 16).gather(dataset.indices("x"))
    best = shipped.probabilities(images).max(1)
    assert [row["probability"] for row in rows] == best.values.tolist()
    assert [row["class"] for row in rows] == [shipped.info.classes[i] for i in best.indices.tolist()]


def test_predict_formats(qtdog, model, tmp_path):
    root, out, _ = model
    model_file, images = out / "model.safetensors", root / "x" / "cat"
    rows = list(csv.DictReader(io.StringIO(qtdog("predict", model_file, images, "--format", "csv").out)))
    assert len(rows) == 6
    assert set(rows[0]) == {"image", "class", "probability", "entropy"}
    assert "probability" in qtdog("predict", model_file, images).out
    for style in ("csv", "json", "table"):
        assert qtdog("predict", model_file, images, "--format", style, "--out", tmp_path / style).code == 0
    assert len(json.loads((tmp_path / "json").read_text())) == 6
    assert (tmp_path / "table").read_text().startswith("| image | class | probability | entropy |")
    assert qtdog("predict", model_file, images, "-o", tmp_path / "by-ending.csv").code == 0
    assert (tmp_path / "by-ending.csv").read_text() == (tmp_path / "csv").read_text()


def test_every_command_refuses_twelve_bits_in_sixteen_by_the_same_sentence(qtdog, model, tmp_path):
    root, out, _ = model
    shutil.copytree(root, tmp_path / "scans")
    file = tmp_path / "scans" / "x" / "cat" / "0.png"
    Image.fromarray(np.linspace(0, 4095, 480).astype(np.uint16).reshape(20, 24)).save(file)
    sentence = f"{file} cannot be read as an image (it has 16 bits, but no value above 4,095, and nothing says which"
    saved = out / "model.safetensors"
    for words in (
        ("data", "verify", file.parents[2]),
        ("train", "--data", file.parents[2], "--target", "x", *NET, "--out", tmp_path / "run"),
        ("predict", saved, file.parent),
        ("eval", saved, file.parents[2]),
    ):
        outcome = qtdog(*words)
        assert outcome.code == 1, words
        assert sentence in " ".join((outcome.out + outcome.err).split()), words


def test_predictions_that_cannot_be_written_are_printed(qtdog, model, tmp_path):
    root, out, _ = model
    (tmp_path / "file").touch()
    outcome = qtdog("predict", out / "model.safetensors", root / "x" / "cat", "-o", tmp_path / "file" / "x.csv")
    assert outcome.code != 0
    assert len(list(csv.DictReader(io.StringIO(outcome.out)))) == 6


def test_loaded_logits_equal_the_training_time_logits(model):
    """The network rebuilt from the last checkpoint, quantizers attached, against the file."""
    from qtdog.conversion.attach import attach
    from qtdog.models.backbones import create_network
    from qtdog.models.network import to_device_
    from qtdog.runs.folder import RunFolder
    from qtdog.training.checkpoint import latest_checkpoint

    root, out, _ = model
    checkpoint = latest_checkpoint(RunFolder(out).checkpoints, print)
    assert checkpoint is not None
    network = create_network(
        "digits_cnn", n_classes=2, channels=3, image_size=16, weights="none", freeze_bn=True, seed=9
    )
    to_device_(network, torch.device("cpu"))
    attach(network, bits=7, exclude=("classifier",)).set_enabled(True)
    network.load_state_dict(checkpoint.tensors["selected"])
    shipped = load_model(out / "model.safetensors")
    images = shipped.prepare(open_cache(open_dataset(str(root)), 16).gather(range(36)))
    with torch.no_grad():
        assert torch.equal(network.eval()(images), shipped(images))


def test_all_targets_give_one_table_and_can_be_resumed(qtdog, model, tmp_path):
    root, _, _ = model
    args = ("train", "--data", root, "--target", "all", *NET, "--quantizer", "none", "--out", tmp_path / "all")
    outcome = qtdog(*args)
    assert outcome.code == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "day",
        "night",
        "plan.json",
        "results.json",
        "results.md",
        "x",
    ]
    table = (tmp_path / "all" / "results.md").read_text()
    assert "| day | night | x | average |" in table
    assert "erm + float" in outcome.out
    (tmp_path / "all" / "night" / "result.json").unlink()
    again = qtdog(*args, "--resume")
    assert again.code == 0
    assert (tmp_path / "all" / "results.md").read_text() == table


def test_a_packed_file_is_the_warm_start_of_a_run_on_all_sites(qtdog, model, tmp_path):
    root, out, _ = model
    file = out / "model.safetensors"
    options = ("--weights", file, "--backbone", "digits_cnn", "--quantizer", "none", "--set", "optimizer.lr=1e-30")
    done = qtdog("train", "--data", root, "--target", "none", *options, *SHORT, "--out", tmp_path / "warm", "--json")
    assert done.code == 0, done.err
    old, new = load_model(file), load_model(tmp_path / "warm" / file.name)
    assert new.info.pretraining.startswith("file model.safetensors sha256:")
    pairs = zip(old.network.featurizer.parameters(), new.network.featurizer.parameters(), strict=True)
    assert all(torch.allclose(one, other, rtol=0, atol=1e-20) for one, other in pairs)  # its updates are tiny


def test_abstain_is_a_share_of_the_validation_images(qtdog):
    outcome = qtdog("train", *NET, "--abstain", "0.25", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "abstain: 0.25" in outcome.out


def test_members_differ_by_their_seed(qtdog, tmp_path):
    outcome = qtdog("train", "--target", "75", *SHORT, "--members", 2, "--seed", 5, "--out", tmp_path / "m", "--json")
    assert outcome.code == 0
    results = json.loads(outcome.out)["runs"]
    assert [result["folder"].rsplit("-", 1)[1] for result in results] == ["seed5", "seed6"]
    assert results[0]["model_sha256"] != results[1]["model_sha256"]


def test_resume_with_out_alone_uses_the_saved_configuration(qtdog, tmp_path):
    assert qtdog("train", "--target", "75", *SHORT, "--bits", 5, "--out", tmp_path / "run").code == 0
    (tmp_path / "run" / "result.json").unlink()
    outcome = qtdog("train", "--resume", "--out", tmp_path / "run", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["layers"][0]["bits"] == 5
    changed = qtdog("train", "--resume", "--out", tmp_path / "run", "--bits", 6)
    assert changed.code == 1
    assert "quantizer.bits: 5 → 6" in changed.err


def test_run_folder_is_named_by_the_hash(qtdog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = qtdog("train", "--target", "75", *SHORT, "--json")
    result = json.loads(outcome.out)
    assert result["folder"] == f"runs/{result['config_hash']}"
    assert (tmp_path / result["folder"] / "model.safetensors").is_file()


def test_demo_writes_one_page_with_every_method(qtdog, tmp_path):
    outcome = qtdog("demo", "--steps", 10, "--out", tmp_path)
    assert outcome.code == 0
    assert str(tmp_path / "report.html") in outcome.err
    assert not list(tmp_path.glob("*.md"))
    report = (tmp_path / "report.html").read_text()
    for method in ("erm + float", "erm + sma + lsq 7 bit", "EoQ of 3"):
        assert method in report
        assert method in outcome.out


@pytest.mark.parametrize(
    "kind",
    [
        *("backbones", "objectives", "feature-layers", "step-rules", "averagers", "quantizers"),
        *("presets", "options"),
    ],
)
def test_list(qtdog, kind):
    outcome = qtdog("list", kind, "--json")
    assert outcome.code == 0
    rows = json.loads(outcome.out)
    assert rows
    expected = {"backbones": "tf_efficientnet_lite0", "objectives": "erm", "quantizers": "lsq", "presets": "pacs-lite"}
    assert expected.get(kind, rows[0]["name"]) in {row["name"] for row in rows}


def test_list_datasets_names_the_command_that_lists_them(qtdog):
    outcome = qtdog("list", "datasets")
    assert outcome.code == 2
    assert "qtdog data list" in outcome.err


def test_list_filters(qtdog):
    rows = json.loads(qtdog("list", "options", "quantizer", "--json").out)
    assert rows
    assert all(row["name"].startswith("quantizer.") for row in rows)


def test_data_commands(qtdog, model):
    root, _, _ = model
    names = {card["name"] for card in json.loads(qtdog("data", "list", "--json").out)}
    assert {"pacs", "rotated-digits"} <= names
    card = json.loads(qtdog("data", "card", root, "--json").out)
    assert card["counts"]["night"] == {"cat": 6, "dog": 6}
    assert "trained" not in qtdog("data", "card", "rotated-digits").out
    assert qtdog("data", "verify", root).code == 0


def test_verify_finds_what_is_wrong(qtdog, image_tree):
    import shutil

    (image_tree / "night" / "cat" / "0.png").write_bytes(b"broken")
    shutil.copy(image_tree / "indoor" / "dog" / "1.png", image_tree / "outdoor" / "dog" / "copy.png")
    shutil.rmtree(image_tree / "outdoor" / "bird")
    outcome = qtdog("data", "verify", image_tree)
    assert outcome.code == 1
    assert "night/cat/0.png" in outcome.out
    assert "copy.png" in outcome.out
    assert "bird" in outcome.out
    assert qtdog("data", "verify", image_tree, "--json").code == 1


def test_help_teaches_with_examples(qtdog):
    for command in ("train", "eval", "predict", "demo", "list"):
        outcome = qtdog(command, "--help")
        assert outcome.code == 0
        assert f"qtdog {command}" in outcome.out


def test_help_is_fast_because_it_does_not_import_torch():
    code = "import sys; from qtdog.cli.main import app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def always(model, tmp_path):
    """Return a function that writes the model with a classifier that always answers one class."""
    packed = load_packed(model[1] / "model.safetensors")

    def write(index):
        rest = dict(packed.rest)
        rest["classifier.bias"] = torch.where(torch.arange(2) == index, 1e4, -1e4).to(rest["classifier.bias"])
        path = tmp_path / f"always-{index}.safetensors"
        save_packed(path, packed.quantized, rest, packed.metadata)
        return path

    return write


def test_compare_names_the_site_where_the_new_model_is_worse(qtdog, model, always, tmp_path):
    north = tmp_path / "sites" / "north"
    for kind, names in (
        ("dog", [f"{domain}/dog/{i}.png" for domain in ("x", "day") for i in range(4)]),
        ("cat", ["x/cat/0.png"]),
    ):
        (north / kind).mkdir(parents=True)
        for number, name in enumerate(names):
            shutil.copy(model[0] / name, north / kind / f"{number}.png")
    asked = ("compare", always(1), always(0), "--data", north.parent)
    outcome = qtdog(*asked, "--json")
    assert outcome.code == 1
    result = json.loads(outcome.out)
    (site,) = result["sites"]
    assert (site["n"], site["n_old"], site["n_new"], site["n_won"], site["n_lost"]) == (9, 8, 1, 1, 8)
    assert site["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert result["worse"] == ["north"]
    shown = qtdog(*asked)
    assert shown.code == 1
    assert "The new model is worse at north" in shown.out


def test_compare_of_a_model_with_itself_finds_nothing(qtdog, model):
    root, out, _ = model
    outcome = qtdog("compare", out, out / "model.safetensors", "--data", root)
    assert outcome.code == 0
    assert "no difference shown" in outcome.out
    assert "x (unseen)" in outcome.out
    assert "day (unseen)" not in outcome.out
