"""`qtdog export` as a user runs it, on a finished run of the embedded digits."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest

from qtdog.data.known_datasets import RotatedDigits
from qtdog.export.parity import validation_images

RUN = ("train", "--data", "rotated-digits", "--target", "75", "--steps", "6", "--image-size", "12")


pytestmark = pytest.mark.usefixtures("one_registry")


@pytest.fixture(scope="module")
def run_folder(stdout_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    stdout_of(*RUN, "--set", "data.batch_size=8", "--set", "train.eval_every=2", "--out", folder)
    assert (folder / "model.safetensors").is_file()
    return folder


def test_a_run_becomes_a_file_that_predicts_alike(qtdog, run_folder, tmp_path):
    outcome = qtdog("export", run_folder, "-o", tmp_path / "m.onnx", "--check", 64)
    assert outcome.code == 0, outcome.err
    assert "100.00" in outcome.out
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    told = json.loads(session.get_modelmeta().custom_metadata_map["qtdog"])
    assert set(told["parity"]["domains"]) == {"0", "15", "30", "45", "60"}
    (logits, *_) = session.run(None, {"images": np.zeros((2, 12, 12, 1), dtype=np.uint8)})
    assert np.asarray(logits).shape == (2, 10)


def test_a_bundle_says_how_right_it_is_on_validation_images_and_on_the_unseen_domain(qtdog, run_folder, tmp_path):
    site = tmp_path / "site"
    outcome = qtdog("export", run_folder, "-o", site, "--bundle", "--format", "onnx", "--check", 10_000)
    assert outcome.code == 0, outcome.err
    assert "validation images of 0, 15, 30, 45, 60" in outcome.out
    about = json.loads((site / "model.json").read_text())
    scores = json.loads((run_folder / "result.json").read_text())["scores"]
    assert about["parity"]["validation"] is True
    counts = {domain: score["n"] for domain, score in scores["source"].items()}
    assert about["parity"]["n_images"] == sum(counts.values())
    right = sum(score["accuracy"] * score["n"] for score in scores["source"].values())
    assert about["parity"]["accuracy_packed"] == pytest.approx(right / sum(counts.values()))
    accuracy = {one["domain"]: one for one in about["accuracy"]}
    assert set(accuracy) == {"0", "15", "30", "45", "60", "75"}
    unseen = accuracy["75"]
    assert (unseen["role"], unseen["accuracy"]) == ("unseen in training", scores["test"]["75"]["accuracy"])
    assert unseen["interval"][0] < unseen["accuracy"] < unseen["interval"][1]
    card = (site / "README.md").read_text()
    assert f"| 75 | unseen in training | {100 * unseen['accuracy']:.1f} |" in card
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run_folder / "model.safetensors").read_bytes())
    assert validation_images(RotatedDigits(), alone) is None  # its run is not known


def test_wrong_orders_say_what_to_do_and_leave_nothing(qtdog, run_folder, tmp_path):
    out = tmp_path / "m.onnx"
    target = qtdog("export", run_folder, "-o", out, "--domain", "75", "--format", "onnx-int8")
    assert target.code == 2
    assert "'75' was held out in training" in target.err
    assert "--force-target" in target.err
    unknown = qtdog("export", run_folder, "-o", out, "--format", "onnx8")
    assert unknown.code == 2
    assert "did you mean 'onnx'" in unknown.err or "did you mean 'onnx-int8'" in unknown.err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it is empty of folders" in qtdog("export", run_folder, "-o", out, "--data", empty).err
    (tmp_path / "file").write_text("")
    assert "cannot be written" in qtdog("export", run_folder, "-o", tmp_path / "file" / "m.onnx").err
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run_folder / "model.safetensors").read_bytes())
    assert "--data" in qtdog("export", alone, "-o", out).err
    assert not out.exists()


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.stress
def test_nothing_is_left_when_the_export_is_told_to_end(run_folder, tmp_path):
    command = [sys.executable, "-m", "qtdog.cli.main", "export", run_folder, "-o", tmp_path / "out" / "m.onnx"]
    for number in (signal.SIGTERM, signal.SIGINT):
        # background jobs of a shell ignore Ctrl-C, and so would the export of a test that is one
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=_hear_ctrl_c)
        while process.poll() is None and not list(tmp_path.glob("out/.*.tmp")):
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(120) in (128 + number, 130)
        assert list((tmp_path / "out").iterdir()) == []
