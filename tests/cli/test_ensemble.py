"""Ensembles from the command line: trained as a whole, resumed as a whole, made of finished runs, and used."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pytest

from qtdog.data.decoded_cache import open_cache
from qtdog.data.known_datasets import RotatedDigits
from qtdog.ensemble.model import load

SHORT = ("--steps", 5, "--batch-size", 4, "--image-size", 12, "--set", "train.eval_every=2")
TRAIN = ("train", "--target", "75", *SHORT)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Three members that share their two float steps, and their ensemble."""
    out = tmp_path_factory.mktemp("five") / "five"
    return out, run_in_process("qtdog", *TRAIN, "--members", 3, "--fork-at", "start", "--out", out, "--json")


def run_in_process(*args):
    """Run a command once for several tests, outside of any test's own capture."""
    import contextlib
    import sys

    from qtdog.cli.main import main

    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stream):
        patch.setattr(sys, "argv", [str(arg) for arg in args])
        with contextlib.suppress(SystemExit):
            main()
    return json.loads(stream.getvalue())


def test_members_end_in_one_ensemble_file_with_its_cost(five):
    out, found = five
    assert [run["forked_from_step"] for run in found["runs"]] == [2, 2, 2]
    assert [run["forked_from_seed"] for run in found["runs"]] == [0, 0, 0]
    assert len({run["model_sha256"] for run in found["runs"]}) == 3
    (ensemble,) = found["ensembles"]
    assert (ensemble["kind"], ensemble["n_members"], ensemble["inference_passes"]) == ("eoq", 3, 3)
    assert ensemble["training_steps"] == 2 + 3 * 3
    assert ensemble["training_runs"] == pytest.approx(0.4 + 3 * 0.6)
    file = out / "75-eoq" / "model.safetensors"
    assert ensemble["size"]["bytes"] == file.stat().st_size
    assert json.loads((out / "75-eoq" / "result.json").read_text())["model_sha256"] == ensemble["model_sha256"]
    members = [run["test_accuracy"] for run in found["runs"]]
    # the member that is best on the sources is asked first
    assert sorted(ensemble["domains"]["test"]["75"]["member_accuracies"]) == sorted(members)
    table = (out / "results.md").read_text()
    assert "| erm + lsq 7 bit: mean of 3 |" in table
    assert "| EoQ of 3 |" in table
    assert "11 (2.2 runs) | 3 |" in table


def test_first_member_of_a_fork_is_the_run_that_was_never_forked(qtdog, five, tmp_path):
    _, found = five
    alone = json.loads(qtdog(*TRAIN, "--out", tmp_path / "run", "--json").out)
    assert alone["model_sha256"] == found["runs"][0]["model_sha256"]


def test_the_whole_is_resumed_with_out_alone(qtdog, five, tmp_path, ctrl_c_after):
    """Stopped in the second member: what is finished stays, the rest comes out as it would have."""
    _, found = five
    args = (*TRAIN, "--members", 3, "--fork-at", "start", "--out", tmp_path / "five")
    with ctrl_c_after(2 + 3 + 1):
        assert qtdog(*args).code != 0
    assert (tmp_path / "five" / "75-seed0" / "result.json").is_file()
    assert not (tmp_path / "five" / "75-seed1" / "result.json").is_file()
    outcome = qtdog("train", "--resume", "--out", tmp_path / "five", "--json")
    assert outcome.code == 0
    again = json.loads(outcome.out)
    assert [run["model_sha256"] for run in again["runs"]] == [run["model_sha256"] for run in found["runs"]]
    assert again["ensembles"][0]["model_sha256"] == found["ensembles"][0]["model_sha256"]
    before = (tmp_path / "five" / "75-eoq" / "model.safetensors").stat().st_mtime_ns
    assert qtdog("train", "--resume", "--out", tmp_path / "five").code == 0
    assert (tmp_path / "five" / "75-eoq" / "model.safetensors").stat().st_mtime_ns == before


def test_finished_runs_make_the_same_file(qtdog, five, tmp_path):
    out, found = five
    runs = sorted(out.glob("75-seed*"))
    outcome = qtdog("ensemble", *runs, "--out", tmp_path / "x.safetensors", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["model_sha256"] == found["ensembles"][0]["model_sha256"]
    assert (tmp_path / "result.json").is_file()
    table = qtdog("ensemble", *runs, "--kind", "eoq", "--out", tmp_path / "folder")
    assert "EoQ of 3" in table.out
    assert str(tmp_path / "folder" / "model.safetensors") in table.out


def test_eval_and_predict_take_an_ensemble(qtdog, five, tmp_path):
    out, made = five
    file = out / "75-eoq" / "model.safetensors"
    outcome = qtdog("eval", file, "rotated-digits", "--json")
    found = json.loads(outcome.out)
    assert found["domains"]["75"]["accuracy"] == made["ensembles"][0]["test_accuracy"]
    assert (found["inference_passes"], found["training_steps"]) == (3, 11)
    assert found["size"]["bytes"] == file.stat().st_size
    assert "eoq of 3 members" in qtdog("eval", file, "rotated-digits").err

    from PIL import Image

    digits = RotatedDigits()
    images = open_cache(digits, 12).gather(digits.indices("75")[:5])
    for k, image in enumerate(images):
        Image.fromarray(image[..., 0].numpy()).save(tmp_path / f"{k}.png")
    rows = list(csv.DictReader(io.StringIO(qtdog("predict", file, tmp_path, "--format", "csv").out)))
    model = load(file)
    best = model.probabilities(images).max(1)
    assert [row["class"] for row in rows] == [model.info.classes[k] for k in best.indices.tolist()]
    assert [float(row["probability"]) for row in rows] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert "forward passes per image 3" in qtdog("predict", file, tmp_path).err


def test_a_soup_is_one_model_and_says_what_it_cost(qtdog, five, tmp_path):
    out, _ = five
    runs = sorted(out.glob("75-seed*"))
    outcome = qtdog("ensemble", *runs, "--kind", "soup", "--refit", "init", "--tune", 2, "--out", tmp_path, "--json")
    result = json.loads(outcome.out)
    assert (result["inference_passes"], result["training_steps"]) == (1, 13)
    assert result["recipe"] == {"pick": "uniform", "refit": "init", "tune_steps": 2, "used": [0, 1, 2]}
    found = json.loads(qtdog("eval", tmp_path / "model.safetensors", "rotated-digits", "--json").out)
    assert found["domains"]["75"]["accuracy"] == result["test_accuracy"]


def test_every_target_gets_its_ensemble(qtdog, image_tree, tmp_path):
    net = ("--backbone", "digits_cnn", "--weights", "none", *SHORT)
    args = ("--data", image_tree, "--target", "all", *net, "--quantizer", "none", "--members", 2)
    outcome = qtdog("train", *args, "--out", tmp_path / "all", "--json")
    assert outcome.code == 0
    ensembles = json.loads(outcome.out)["ensembles"]
    assert [ensemble["target_domain"] for ensemble in ensembles] == ["indoor", "night", "outdoor"]
    assert {ensemble["kind"] for ensemble in ensembles} == {"ensemble"}
    assert "| ensemble of 2 |" in (tmp_path / "all" / "results.md").read_text()


def test_members_with_different_splits_have_no_score_on_the_sources(qtdog, tmp_path):
    outcome = qtdog(*TRAIN, "--members", 2, "--member-splits", "different", "--out", tmp_path / "m")
    assert outcome.code == 0
    assert "No score of the ensemble on the sources: the members held out different images" in outcome.out
    result = json.loads((tmp_path / "m" / "75-eoq" / "result.json").read_text())
    assert [member["trial"] for member in result["members"]] == [0, 1]
    assert result["source_accuracy"] is None
    assert result["test_accuracy"] is not None


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--fork-at", "start"), 2, "are for several members: add --members"),
        (("--members", 2, "--fork-at", "end"), 2, "takes 'start' (of quantization) or a step, not 'end'"),
        (("--members", 2, "--fork-at", "start", "--member-splits", "different"), 2, "leave out one of"),
        (("--members", 2, "--fork-at", "start", "--quantizer", "none"), 2, "has no start step"),
        (("--members", 2, "--fork-at", 4), 2, "there are no 4 float steps to share"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(qtdog, tmp_path, args, code, message):
    outcome = qtdog(*TRAIN, *args, "--out", tmp_path / "x")
    assert outcome.code == code
    assert message in outcome.err


def test_float_members_may_part_at_a_step(qtdog, tmp_path):
    args = ("--quantizer", "none", "--members", 2, "--fork-at", 3, "--out", tmp_path / "x", "--json")
    found = json.loads(qtdog(*TRAIN, *args).out)
    assert [run["forked_from_step"] for run in found["runs"]] == [3, 3]
    assert found["ensembles"][0]["training_steps"] == 3 + 2 * 2


def test_a_run_with_another_beginning_is_not_taken_for_a_fork(qtdog, five, tmp_path):
    out, _ = five
    shutil.copytree(out, tmp_path / "five")
    result = tmp_path / "five" / "75-seed1" / "result.json"
    found = json.loads(result.read_text())
    result.write_text(json.dumps(found | {"forked_from_step": 0, "forked_from_seed": 1}))
    outcome = qtdog("train", "--resume", "--out", tmp_path / "five")
    assert outcome.code == 1
    assert "did not begin from the 2 steps in" in outcome.err


def test_bad_members_and_places_get_a_clear_answer(qtdog, five, tmp_path):
    out, _ = five
    first, second, _ = sorted(out.glob("75-seed*"))
    for runs, code, message in (
        ([first], 2, "two runs or more, not 1"),
        ([first, first], 2, "hold the same model"),
        ([first, out / "75-eoq"], 2, "holds an ensemble; give the runs that it was made of"),
        ([first, tmp_path / "none"], 1, "is no folder"),
        ([first, out / "75-beginning"], 1, "is not finished"),
    ):
        outcome = qtdog("ensemble", *runs, "--out", tmp_path / "x")
        assert outcome.code == code
        assert message in outcome.err
    outcome = qtdog("ensemble", first, second, "--out", second)
    assert outcome.code == 1
    assert "would be lost; choose another --out" in outcome.err
    outcome = qtdog("ensemble", first, second, "--kind", "eok", "--out", tmp_path / "x")
    assert "unknown kind of ensemble 'eok'" in outcome.err


def test_images_that_are_gone_are_no_obstacle_unless_they_are_needed(qtdog, image_tree, tmp_path):
    net = ("--backbone", "digits_cnn", "--weights", "none", *SHORT, "--set", "model.init_seed=0")
    out = tmp_path / "runs"
    args = ("train", "--data", image_tree, "--target", "night", *net, "--members", 2, "--out", out)
    assert qtdog(*args).code == 0
    image_tree.rename(image_tree.parent / "moved")
    runs = sorted(out.glob("night-seed*"))
    outcome = qtdog("ensemble", *runs, "--out", tmp_path / "a", "--json")
    assert outcome.code == 0
    assert "nothing is measured" in outcome.err
    assert json.loads(outcome.out)["test_accuracy"] is None
    there = qtdog("ensemble", *runs, "--data", image_tree.parent / "moved", "--out", tmp_path / "a", "--json")
    assert json.loads(there.out)["test_accuracy"] is not None
    needed = qtdog("ensemble", *runs, "--kind", "diwa", "--pick", "greedy", "--out", tmp_path / "b")
    assert needed.code == 2
    assert "--pick greedy needs the images of the source domains: give --data" in needed.err
