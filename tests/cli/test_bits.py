"""`qtdog bits` on small images: what it opens, keeps, recommends and refuses."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from qtdog.analysis.bit_plan import BitPlan, choose, without_target
from qtdog.analysis.bit_search import BitTrials
from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import CollapseError
from qtdog.data.augment import normalize
from qtdog.data.corruptions import corrupt
from qtdog.data.decoded_cache import open_cache
from qtdog.data.image_folder import open_folder
from qtdog.training.load_model import load_model
from qtdog.training.protocol import make_protocol, resolve
from qtdog.training.run import RunCallbacks

NET = ("--backbone", "digits_cnn", "--weights", "none", "--image-size", 12, "--batch-size", 4)
RUN = ("--steps", 8, "--start-step", 3, "--set", "train.eval_every=2")
BRIEF = ("--brief-steps", 2, "--directions", 2)


class Opened:
    """Notes every file that this process opens inside of `with`; an audit hook cannot be removed, but be silent."""

    hooked: Opened | None = None

    def __init__(self):
        self.names, self.listens = set(), False

    def __call__(self, event, args):
        if self.listens and event == "open":
            self.names.add(str(args[0]))

    @classmethod
    @contextlib.contextmanager
    def listening(cls):
        if cls.hooked is None:
            cls.hooked = cls()
            sys.addaudithook(cls.hooked)
        cls.hooked.names.clear()
        cls.hooked.listens = True
        try:
            yield cls.hooked.names
        finally:
            cls.hooked.listens = False


@pytest.fixture
def tree(image_tree):
    """Return the tree of images and the options that ask for the bits for its domain `night`."""
    return image_tree, ("--data", image_tree, "--target", "night", *NET, *RUN)


def test_no_file_of_the_target_is_opened(qtdog, tree, tmp_path):
    root, options = tree
    with Opened.listening() as opened:
        done = qtdog("bits", *options, *BRIEF, "--candidates", "7,3", "--out", tmp_path / "out", "--json")
    report = json.loads(done.out)
    assert len([name for name in opened if name.startswith(str(root / "indoor"))]) == 18
    assert [name for name in opened if name.startswith(str(root / "night"))] == []
    assert {candidate["bits"] for candidate in report["candidates"]} == {7, 3}
    assert set(report["candidates"][0]["accuracies"]) == {"indoor", "outdoor"}
    assert report["choice"] in (7, 3)
    assert report["n_steps"] == 2 * (3 + 2 * 2)


def test_a_trial_is_the_run_that_one_would_train_alone(qtdog, tree, tmp_path):
    root, options = tree
    report = json.loads(qtdog("bits", *options, *BRIEF, "--candidates", 5, "--out", tmp_path / "out", "--json").out)
    shutil.rmtree(root / "night")
    alone = ("train", "--data", root, "--target", "outdoor", *NET, "--bits", 5, "--start-step", 3, "--steps", 5)
    result = json.loads(qtdog(*alone, "--set", "train.eval_every=2", "--out", tmp_path / "alone", "--json").out)
    kept = json.loads((tmp_path / "out" / "outdoor" / "5-bit" / "result.json").read_text())
    assert kept["model_sha256"] == result["model_sha256"]
    assert kept["forked_from_step"] == 3
    (candidate,) = report["candidates"]
    assert candidate["accuracies"]["outdoor"] == result["test_accuracy"]
    assert candidate["n_bytes"] == result["size"]["bytes"]
    assert {trial["gamma"] for trial in report["trials"]} != {None}


def test_candidates_can_be_scored_under_corruptions_of_source_images(qtdog, tree, tmp_path, no_updates):
    root, options = tree
    words = ("bits", *options, *BRIEF, "--candidates", 5, "--out", tmp_path / "out", "--json")
    clean = json.loads(qtdog(*words).out)
    with no_updates():  # scores alone are new
        report = json.loads(qtdog(*words, "--shift", "jpeg", "--shift", "contrast").out)
        assert json.loads(qtdog(*words).out)["trials"] == clean["trials"]
    assert report["shift"] == ["contrast", "jpeg"]
    assert "under contrast, jpeg (mean over five severities)" in report["title"]
    sources = without_target(open_folder(root), "night")
    config = Config.read(tmp_path / "out" / "indoor" / "5-bit")
    heldout = make_protocol(config, sources).splits["outdoor"].heldout
    model = load_model(tmp_path / "out" / "indoor" / "5-bit" / "model.safetensors")
    cache, right = open_cache(sources, 12), []
    for name in report["shift"]:
        for severity in range(1, 6):
            images = corrupt(cache.gather(heldout).permute(0, 3, 1, 2), name, severity, keys=heldout.tolist())
            how = model.info.preprocessing
            logits = model(normalize(images.permute(0, 2, 3, 1), how.mean, how.std))
            right.append((logits.argmax(1).numpy() == sources.class_index[heldout]).mean())
    (trial,) = [trial for trial in report["trials"] if trial["left_out"] == "indoor"]
    assert trial["accuracy"] == pytest.approx(sum(right) / len(right))
    refused = qtdog("bits", *options, "--mode", "mixed", "--budget", 5, "--shift", "noise")
    assert "--mode mixed trains none" in refused.err


def test_the_same_command_goes_on_after_an_interruption(qtdog, tree, tmp_path, ctrl_c_after, no_updates):
    _, options = tree
    words = ("bits", *options, *BRIEF, "--candidates", "7,3", "--json", "--out")
    whole = qtdog(*words, tmp_path / "whole")
    with ctrl_c_after(6):
        stopped = qtdog(*words, tmp_path / "broken")
    assert stopped.code == 130
    assert "the same command goes on from there" in stopped.err
    gone_on = qtdog(*words, tmp_path / "broken")
    same = ("choice", "candidates", "trials")
    one, other = json.loads(whole.out), json.loads(gone_on.out)
    assert [one[name] for name in same] == [other[name] for name in same]

    with no_updates():  # what is finished is not done again; a candidate can be added
        assert qtdog(*words, tmp_path / "whole").out == whole.out
    more = qtdog("bits", *options, *BRIEF, "--candidates", "7,5,3", "--out", tmp_path / "whole")
    assert more.code == 0
    assert "| 5 " in (tmp_path / "whole" / "choice.md").read_text()
    changed = qtdog(*words, tmp_path / "whole", "--lr", 0.5)
    assert changed.code == 1
    assert "optimizer.lr" in changed.err


def test_a_candidate_that_collapses_does_not_end_the_choice(three_digits, short_config, tmp_path):
    def collapses_in_3_bits(components, warn):
        def check(layers, records):
            if layers and components.config.quantizer.bits == 3:
                raise CollapseError("the network collapsed", {})

        return check

    told = []
    config = short_config(
        data={"target": "none", "batch_size": 4, "image_size": 8}, train={"steps": 6, "eval_every": 2}
    )
    sources = without_target(three_digits, "75")
    plan = BitPlan(resolve(config, sources), sources, (7, 3), brief_steps=2, n_directions=2)
    callbacks = RunCallbacks(warn=told.append, make_health_check=collapses_in_3_bits)
    trials = BitTrials(plan, tmp_path, callbacks, lambda text: None).run()
    assert choose(trials).bits == 7
    assert {(trial.bits, trial.accuracy is None) for trial in trials} == {(7, False), (3, True)}
    assert any(text.startswith("3 bits without 0: the network collapsed") for text in told)


def test_the_line_to_use_is_a_command_that_trains_with_the_choice(qtdog, tree, tmp_path):
    _, options = tree
    outcome = qtdog("bits", *options, *BRIEF, "--candidates", 6, "--out", tmp_path / "out")
    line = json.loads((tmp_path / "out" / "choice.json").read_text())["use"]
    assert f"  {line}\n" in outcome.out
    words = shlex.split(line)
    assert words[:2] == ["qtdog", "train"]
    result = json.loads(qtdog(*words[1:], "--out", tmp_path / "run", "--json").out)
    assert {layer["bits"] for layer in result["layers"]} == {6}
    assert result["target_domain"] == "night"


def test_mixed_bits_keep_the_budget_and_can_be_trained(qtdog, tmp_path):
    words = ("bits", "--target", 75, "--steps", 4, "--start-step", 2, "--batch-size", 4, "--image-size", 8)
    mixed = ("--mode", "mixed", "--budget", 5.5, "--vectors", 2, "--out", tmp_path / "out", "--json")
    outcome = qtdog(*words, *mixed)
    report = json.loads(outcome.out)
    file = tmp_path / "out" / "layer_bits.yaml"
    assert yaml.safe_load(file.read_text()) == {"quantizer": {"layer_bits": report["choice"]}}
    assert build_config([load_preset(str(file))]).quantizer.layer_bits == report["choice"]
    assert report["average_bits"] <= 5.5
    assert report["cost"] <= report["uniform_cost"]
    assert report["uniform_bits"] == 5
    assert qtdog(*words, *mixed).out == outcome.out
    line = shlex.split(report["use"])
    assert line[line.index("--preset") + 1] == "digits"  # else the layers' preset would take its place
    result = json.loads(qtdog(*line[1:], "--out", tmp_path / "run", "--json").out)
    assert {layer["name"]: layer["bits"] for layer in result["layers"]} == report["choice"]
    weights = [(layer["n_weights"], layer["bits"]) for layer in result["layers"]]
    assert sum(n * b for n, b in weights) / sum(n for n, _ in weights) == pytest.approx(report["average_bits"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--target", "57"), 2, "unknown target domain '57'; did you mean '75'"),
        (("--target", "all"), 2, "unknown target domain 'all'"),
        (("--quantizer", "none"), 2, "no bits to choose"),
        (("--candidates", "9"), 2, "bits must be 2 to 8, not 9"),
        (("--mode", "mixed"), 2, "--mode mixed needs --budget"),
        (("--budget", 5), 2, "only that mode takes it"),
        (("--mode", "mixed", "--budget", 3, "--candidates", "8,4"), 2, "below the smallest candidate"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(qtdog, words, code, message, tmp_path, monkeypatch, no_updates):
    monkeypatch.chdir(tmp_path)
    with no_updates():
        outcome = qtdog("bits", *words)
    assert outcome.code == code
    assert message in outcome.err
    assert not Path("runs").exists()


def test_one_source_is_too_few(qtdog, image_tree):
    shutil.rmtree(image_tree / "outdoor")
    outcome = qtdog("bits", "--data", image_tree, "--target", "night", *NET)
    assert outcome.code == 2
    assert "two source domains or more, found indoor" in outcome.err
