"""Names of commands and options: one for one thing, old ones with a note, the nearest for a mistyped one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qtdog as package


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
