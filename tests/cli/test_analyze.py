"""`qtdog analyze` on short runs: every command, what it keeps, what it refuses, and stopping in the middle."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from torch.nn.modules.module import register_module_forward_hook

from qtdog.analysis.analyzed_run import open_analyzed_runs
from qtdog.analysis.flatness import FlatnessPlan, measure_flatness
from qtdog.analysis.hessian import HessianPlan, measure_hessian
from qtdog.core.config_io import build_config, load_preset
from qtdog.core.errors import Interrupted
from qtdog.data.known_datasets import RotatedDigits
from qtdog.runs.folder import RunFolder
from qtdog.training.protocol import resolve
from qtdog.training.run import run

SHORT = {
    "data": {"target": "75", "batch_size": 4, "image_size": 12},
    "train": {"steps": 6, "eval_every": 2},
}
LSQ = {"quantizer": {"name": "lsq", "bits": 4, "start_step": 2}}
N_DOMAINS = 6  # of the digits
FLAT = ("--directions", 4, "--images", 5, "--radii", "0,3", "--filter-radii", "0.1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a float and a quantized run, and one that averages."""
    root, dataset = tmp_path_factory.mktemp("runs"), RotatedDigits()
    sections = {"float": {"quantizer": {"name": "none"}}, "lsq": LSQ, "swa": LSQ | {"averager": {"name": "swa"}}}
    for name, section in sections.items():
        config = resolve(build_config([load_preset("digits"), SHORT, section]), dataset)
        run(config, dataset, RunFolder(root / name))
    return {name: root / name for name in sections}


def said(folder: Path) -> dict:
    return json.loads((folder / "analysis.json").read_text())


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("flatness", FLAT, {"on", "gamma", "increase", "standard_error"}),
        pytest.param(
            "hessian",
            ("--images", 1, "--vectors", 10, "--probes", 2, "--eigenvalues", 1),
            {"trace", "standard_error", "top_eigenvalue"},
            marks=pytest.mark.stress,  # ten seconds; tests/api/test_analyses.py has the same from Python
        ),
        ("surface", ("--points", 3, "--images", 5), {"x", "y", "sources", "target"}),
        ("stability", (), {"spearman", "largest_drop", "best"}),
        ("cam", ("--images", 3, "--shown", 2), {"deletion", "random_deletion", "insertion"}),
        ("errors", ("--images", 20, "--mistakes", 3), {"gap", "worst_class", "worst_domain"}),
    ],
)
def test_every_command_leaves_numbers_figures_and_a_description(qtdog, runs, tmp_path, kind, options, names):
    found = qtdog("analyze", kind, runs["float"], runs["lsq"], *options, "--out", tmp_path, "--json")
    assert found.code == 0, found.err
    folder = tmp_path / kind
    outcome = said(folder)
    assert json.loads(found.out) == outcome
    assert outcome["kind"] == kind
    assert [entry["label"] for entry in outcome["runs"]] == ["erm + float", "erm + lsq 4 bit"]
    assert names <= set(outcome["numbers"][0])
    assert {Path(name).suffix for name in outcome["figures"]} == {".png", ".pdf"}
    assert all((folder / name).stat().st_size > 1000 for name in outcome["figures"])
    with (folder / outcome["data"][0]).open() as stream:
        assert len(list(csv.DictReader(stream))) == len(outcome["numbers"])


def test_noise_is_that_of_the_shipped_codes_also_of_an_average(qtdog, runs, tmp_path):
    assert qtdog("analyze", "noise", runs["lsq"], runs["swa"], "--out", tmp_path).code == 0
    outcome = said(tmp_path / "noise")
    pooled = [row for row in outcome["numbers"] if row["layer"] == "all layers"]
    assert len(pooled) == 2
    for row in pooled:  # other weights than those that were rounded would not lie next to their codes
        assert row["moved_frac"] == 0
        assert row["excess"] == pytest.approx(row["kl"] - row["floor"])


class Checks:
    """Counts how often an analysis asks whether to stop, and stops it at one of them."""

    def __init__(self, stop_at: int = 0) -> None:
        self.n, self.stop_at = 0, stop_at

    def __call__(self) -> None:
        self.n += 1
        if self.n == self.stop_at:
            raise Interrupted("stop")


@pytest.mark.stress
def test_a_stopped_flatness_goes_on_and_ends_the_same(runs, tmp_path):
    plan = FlatnessPlan({"absolute": (0.0, 3.0), "filter": (0.1,)}, n_directions=4, n_images=5)
    opened = open_analyzed_runs([runs["float"], runs["lsq"]], ["float", "lsq"])
    whole, stopped, resumed, again = Checks(), Checks(stop_at=10 * N_DOMAINS + 3), Checks(), Checks()
    measure_flatness(opened, plan, tmp_path / "whole", check=whole)
    assert whole.n == 2 * (1 + 4 * 2) * N_DOMAINS  # one batch of each domain, at each place of each run
    with pytest.raises(Interrupted):
        measure_flatness(opened, plan, tmp_path / "parts", check=stopped)
    assert not (tmp_path / "parts" / "analysis.json").exists()
    measure_flatness(opened, plan, tmp_path / "parts", check=resumed)
    assert stopped.n + resumed.n == whole.n + 3  # nothing twice but the pass that was stopped
    for name in ("points.csv", "flatness.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    measure_flatness(opened, plan, tmp_path / "parts", check=again)
    assert again.n == 0


@pytest.mark.stress
def test_a_stopped_hessian_goes_on_and_ends_the_same(runs, tmp_path):
    plan = HessianPlan(n_images=2, max_vectors=12, error_frac=1e-9, n_eigenvalues=1, n_probes=0)
    opened = open_analyzed_runs([runs["float"]], ["float"])
    whole = Checks()
    expected = measure_hessian(opened, plan, tmp_path / "whole", check=whole)
    last_portion = 2 * (N_DOMAINS - 1)  # two images of each source, one by one
    stopped, resumed = Checks(stop_at=whole.n - 4), Checks()
    with pytest.raises(Interrupted):
        measure_hessian(opened, plan, tmp_path / "parts", check=stopped)
    found = measure_hessian(opened, plan, tmp_path / "parts", check=resumed)
    assert resumed.n == last_portion  # neither the eigenvalues nor the first vectors again
    assert found == expected
    (row,) = found["numbers"]
    assert row["n_vectors"] == 12
    assert row["image_error"] > 0


def test_a_stopped_command_says_how_to_go_on(qtdog, runs, tmp_path):
    asked = ("analyze", "surface", runs["float"], "--points", 3, "--images", 2, "--out", tmp_path)
    keys = iter([signal.SIGINT])

    def press_once(*_):
        for key in keys:
            signal.raise_signal(key)

    hook = register_module_forward_hook(press_once)  # Ctrl-C at the first forward pass
    try:
        stopped = qtdog(*asked)
    finally:
        hook.remove()
    assert stopped.code == 130
    assert "the same command goes on" in stopped.err
    assert not (tmp_path / "surface" / "analysis.json").exists()
    assert qtdog(*asked).code == 0


def test_a_plane_around_one_run(qtdog, runs, tmp_path):
    asked = ("analyze", "surface", runs["lsq"], "--plane", "--points", 3, "--images", 4, "--out", tmp_path)
    assert qtdog(*asked).code == 0
    numbers = said(tmp_path / "surface")["numbers"]
    assert [(row["x"], row["y"]) for row in numbers][:4] == [(-0.25, -0.25), (-0.25, 0), (-0.25, 0.25), (0, -0.25)]


def test_a_run_without_checkpoint_is_refused_by_noise_alone(qtdog, runs, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(runs["lsq"], bare)
    shutil.rmtree(bare / "checkpoint")
    found = qtdog("analyze", "noise", bare, "--out", tmp_path / "out")
    assert (found.code, "has no checkpoint" in found.err) == (1, True)
    asked = ("analyze", "surface", bare, "--points", 3, "--images", 2)
    assert qtdog(*asked, "--out", tmp_path / "out").code == 0


def test_what_makes_no_sense_is_refused(qtdog, runs, tmp_path, image_tree):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs["lsq"], unfinished)
    (unfinished / "model.safetensors").unlink()
    cases = {
        ("flatness", unfinished): "is not finished",
        ("noise", runs["float"]): "saved float weights",
        ("flatness", tmp_path / "nowhere"): "is no folder",
        ("stability", image_tree): "has no config.yaml",
        ("errors", runs["lsq"], "--data", image_tree): "other images",
        ("flatness", runs["lsq"], runs["lsq"]): "named twice",
        ("flatness", runs["lsq"], "--directions", 5): "--directions",
        ("flatness", runs["lsq"], "--radii", "", "--filter-radii", ""): "one at least",
        ("flatness", runs["lsq"], "--radii", "-1"): "0 or more",
        ("flatness", runs["lsq"], "--filter-radii", "0,x"): "got '0,x'",
        ("surface", *runs.values()): "one run or between two",
        ("cam", runs["lsq"], "--domain", "99"): "--domain",
        ("hessian", runs["lsq"], "--probes", 1): "--probes",
    }
    for words, text in cases.items():
        found = qtdog("analyze", *words, "--out", tmp_path / "out")
        assert found.code in (1, 2), words
        assert text in found.err, (words, found.err)


def test_other_settings_in_the_same_folder_are_refused(qtdog, runs, tmp_path):
    asked = ("analyze", "surface", runs["lsq"], "--points", 3, "--out", tmp_path)
    assert qtdog(*asked, "--images", 2).code == 0
    found = qtdog(*asked, "--images", 3)
    assert (found.code, "n_images: 2 → 3" in found.err) == (1, True)


@pytest.mark.stress
def test_the_commands_keep_their_old_names(qtdog, runs, tmp_path):
    asked = (runs["lsq"], "--images", 5, "--mistakes", 1, "--out", tmp_path, "--json")
    old, new = qtdog("analyse", "slices", *asked), qtdog("analyze", "errors", *asked)
    assert (old.code, new.code) == (0, 0)
    assert json.loads(old.out)["numbers"] == json.loads(new.out)["numbers"]
    assert not re.search(r"\banalyse\b", qtdog("--help").out)
