"""Names of commands and options: one for one thing, old ones with a note, the nearest for a mistyped one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import qtdog as package
from qtdog.cli.main import app


def test_version(qtdog: Any):
    assert qtdog("--version").out.strip() == package.__version__


@pytest.mark.parametrize("words", [("-h",), ("train", "-h"), ("analyze", "flatness", "-h"), ("sweep", "status", "-h")])
def test_short_help(qtdog: Any, words: tuple[str, ...]):
    outcome = qtdog(*words)
    assert outcome.code == 0
    assert "Usage" in outcome.out


@pytest.mark.parametrize(
    ("words", "nearest"), [(("trian",), "train"), (("analyze", "flatnes"), "flatness"), (("data", "vefiry"), "verify")]
)
def test_a_mistyped_command_gets_the_nearest(qtdog: Any, words: tuple[str, ...], nearest: str):
    outcome = qtdog(*words)
    assert outcome.code == 2
    assert f"did you mean '{nearest}'" in outcome.err


def test_old_names_work_with_a_note(qtdog: Any, tmp_path: Path):
    for name, note in (("--out", "note: --out is called --output now"), ("--output", ""), ("-o", "")):
        outcome = qtdog("train", "--resume", name, tmp_path / "nothing")
        assert f"there is no run in {tmp_path / 'nothing'}" in outcome.err
        assert (note in outcome.err) if note else ("note:" not in outcome.err)
    old = qtdog("analyse", "flatness", tmp_path, "--images", "4", f"--out={tmp_path / 'a'}")
    assert "note: --images is called --num-images now" in old.err
    assert "No such" not in old.err


def test_every_command_writes_to_output_and_no_help_shows_an_old_name(qtdog: Any):
    for words in (
        ("train",),
        ("export",),
        ("predict",),
        ("demo",),
        ("analyze", "hessian"),
        ("sweep", "run"),
        ("table",),
    ):
        shown = qtdog(*words, "-h").out
        assert "--output" in shown
        assert "-o" in shown
        assert " --out " not in shown.partition("Options")[2]
    assert "--runs" in qtdog("runs", "-h").out


def test_a_plugin_stands_anywhere_and_its_mistakes_are_told(qtdog: Any, tmp_path: Path):
    (tmp_path / "mine.py").write_text("import qtdog\n@qtdog.register('averager', 'mine')\nclass Mine: 'My own.'\n")
    for words in (
        ("--plugin", tmp_path / "mine.py", "list", "averagers"),
        ("list", "averagers", f"--plugin={tmp_path / 'mine.py'}"),
    ):
        assert "plug-in mine.py" in qtdog(*words).out
    outcome = qtdog("list", "averagers", "--plugin", tmp_path / "none.py")
    assert outcome.code == 2
    assert "is not a Python file" in outcome.err


@pytest.mark.parametrize(
    ("words", "nearest"), [(("statu", "study.yaml"), "status"), (("tabel",), "table"), (("mrege", "-o", "x"), "merge")]
)
def test_a_mistyped_command_of_sweep_gets_the_nearest_and_a_study_is_run(
    qtdog: Any, words: tuple[str, ...], nearest: str
):
    outcome = qtdog("sweep", *words)
    assert outcome.code == 2
    assert f"did you mean '{nearest}'" in outcome.err
    for study in ("none.yaml", "studies/none"):
        assert f"the study file {study} does not exist" in qtdog("sweep", study).err


def test_what_a_command_reads_is_runs_and_what_it_writes_is_output(qtdog: Any, tmp_path: Path):
    for words, option in (
        (("sweep", "status", "none.yaml", "--out", tmp_path), "--out is called --runs now"),
        (("sweep", "merge", tmp_path, "--into", tmp_path / "new"), "--into is called --output now"),
        (("data", "import", tmp_path, "--to", tmp_path / "new"), "--to is called --output now"),
        (("runs", "--csv", "--out", tmp_path), "--csv is called --format csv now"),
        (("bits", "--directions", "0"), "--directions is called --num-directions now"),
        (("bench", tmp_path, "--rounds", "1"), "--rounds is called --num-rounds now"),
    ):
        assert f"note: {option}" in qtdog(*words).err


def test_json_is_a_format_everywhere(qtdog: Any):
    assert qtdog("list", "averagers", "--format", "json").out == qtdog("list", "averagers", "--json").out
    assert qtdog("list", "averagers", "--format=text").out == qtdog("list", "averagers").out
    refused = qtdog("list", "averagers", "--format", "jsn")
    assert refused.code == 2
    assert "did you mean 'json'" in refused.err


def test_every_command_that_composes_lists_plugin(qtdog: Any):
    for words in (("train",), ("bits",), ("distill",), ("dart",), ("sweep", "run"), ("sweep", "retry"), ("eval",)):
        assert "--plugin" in qtdog(*words, "-h").out
    assert "--plugin" not in qtdog("sweep", "merge", "-h").out


def test_a_run_folder_is_a_model_for_every_command(qtdog: Any, tmp_path: Path):
    run = tmp_path / "run"
    small = ("--steps", 2, "--batch-size", 2, "--image-size", 12, "--set", "train.eval_every=2")
    assert qtdog("train", "--target", "75", *small, "-o", run).code == 0
    for words in (
        ("eval", run),
        ("eval", run, "rotated-digits"),
        ("inspect", run),
        ("export", run, "-o", tmp_path / "model.h", "--num-check", 4),
        ("distill", run, *small[:2], "--set", "data.batch_size=2", "-o", tmp_path / "student"),
    ):
        outcome = qtdog(*words)
        assert outcome.code == 0, outcome.err
    named = qtdog("eval", run, "--data", "rotated-digits", "--json")
    assert json.loads(named.out) == json.loads(qtdog("eval", run / "model.safetensors", "--json").out) | {
        "model": str(run / "model.safetensors")
    }
    assert "two data sets are given" in qtdog("eval", run, "a", "--data", "b").err
    for command in ("eval", "inspect", "predict", "distill"):
        more = (tmp_path,) if command == "predict" else ()
        assert "holds no model; did you mean" in qtdog(command, tmp_path, *more).err


def test_every_option_has_a_sentence():
    root = typer.main.get_command(app)
    short = {}
    for path, command in commands_below(root, ()):
        for option in command.params:
            text = getattr(option, "help", None) or ""
            if option.name != "help" and not text.endswith("."):
                short[" ".join(path), option.name] = text
    assert short == {}


def commands_below(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from commands_below(child, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


def test_members_of_plugins_are_listed_with_their_file(qtdog: Any):
    file = Path(__file__).parents[2] / "examples" / "own_methods.py"
    for words, name in (
        (("list", "backbones"), "patches"),
        (("list", "backbones", "patch"), "patches"),
        (("list", "objectives"), "worst-domain"),
        (("data", "list"), "tinted"),
    ):
        lines = qtdog(*words, "--plugin", file).out.splitlines()
        (line,) = [line for line in lines if line.startswith(name)]
        assert "plug-in own_methods.py" in line
