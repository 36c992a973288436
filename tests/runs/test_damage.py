"""Damaged files of a run folder: each is one line that names it, and the other runs are shown."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qtdog.cli.main import app
from qtdog.core.errors import RunError
from qtdog.runs.find import find_runs, read_run
from qtdog.runs.folder import RunFolder
from qtdog.runs.index import ask, index_file, refresh

DAMAGES = {
    "result.json": ["", "[" * 100_000, "[]", "7", '{"a":' * 1000, "\ud800"],
    "config.yaml": ["", "a: &a [*a]", "- 1", "train: 3", "train: {steps: {}}", "[" * 5000, "\x00"],
    "metrics.jsonl": ["[]\n{}\n", '{"step": {}}\n{}\n', "[" * 100_000 + "\n{}\n"],
}
CASES = [(name, text) for name, texts in DAMAGES.items() for text in texts]


@pytest.fixture
def two(tmp_path, make_run):
    """A folder with two finished runs."""
    for name in ("good", "bad"):
        make_run(tmp_path / "runs" / name, train={"seed": len(name)})
    return tmp_path / "runs"


def check_bad_is_named(two: Path, name: str) -> None:
    for command in (["table", two], ["report", two, "-o", two.parent / "r.html"], ["runs", "--out", two]):
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exception is None, (command, done.exception)
        lines = [line for line in done.stderr.splitlines() if str(two / "bad" / name) in line]
        assert len(lines) == 1, done.stderr
        assert "good" in done.stdout or "erm" in done.stdout or (two.parent / "r.html").is_file()
    assert [run.path.name for run in find_runs([two]).runs] == ["good"]
    assert {row["folder"]: row["state"] for row in ask(refresh(two))} == {"good": "done", "bad": "damaged"}


@pytest.mark.parametrize(("name", "text"), CASES, ids=range(len(CASES)))
def test_a_damaged_file_is_one_line_and_the_others_are_shown(name, text, two):
    (two / "bad" / name).write_text(text, errors="surrogatepass")
    if text == "" and name == "config.yaml":  # an empty file is a configuration of defaults
        return
    check_bad_is_named(two, name)


WRONG = {
    "selection": 3,
    "source_accuracy": "0.5",
    "test_accuracy": 7.0,
    "selected_step": -1,
    "size": {"bytes": "1"},
    "test_accuracy_80": {"a": []},
    "environment": [],
    "members": [{"folder": "a\x00"}],
    "trained_s": 1e300,
    "test_mode": None,
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_another_type_is_named(key, two):
    file = two / "bad" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: WRONG[key]}))
    with pytest.raises(RunError, match=key):
        read_run(two / "bad")
    check_bad_is_named(two, "result.json")


@pytest.mark.parametrize("name", ["result.json", "config.yaml", "metrics.jsonl"])
def test_a_link_or_a_pipe_in_the_place_of_a_file_is_not_followed(name, two, tmp_path):
    (two / "bad" / name).rename(tmp_path / "elsewhere")
    (two / "bad" / name).symlink_to(tmp_path / "elsewhere")
    check_bad_is_named(two, name)


def test_a_damaged_diagnosis_is_named(two):
    (two / "bad" / "result.json").unlink()
    (two / "bad" / "diagnosis.json").write_text("[" * 100_000)
    row = ask(refresh(two), "folder = 'bad'")[0]
    assert row["state"] == "damaged"
    assert "diagnosis.json" in str(row["error"])


def test_only_damaged_runs_are_an_error_that_lists_them(two):
    for name in ("good", "bad"):
        (two / name / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"(?s)no finished run.*bad.*good"):
        find_runs([two])


def test_an_empty_model_is_no_finished_run(two):
    (two / "bad" / "model.safetensors").write_bytes(b"")
    check_bad_is_named(two, "model.safetensors")
    folder = RunFolder(two / "bad")
    assert folder.read_result() is not None
    assert folder.finished_result() is None


def test_a_model_of_another_hash_is_no_finished_run(two):
    folder = RunFolder(two / "bad")
    folder.model_file.write_bytes(b"other")
    result = json.loads(folder.result_file.read_text()) | {"model_sha256": "0" * 64}
    folder.result_file.write_text(json.dumps(result))
    assert folder.finished_result() is None
    assert "is not the file that the run wrote" in folder.model_problem(result)


ODD_RESULTS = [
    {"size": {"a": 1}},
    {"source_accuracy": [None]},
    {"scores": 5},
    {"scores": {"source": {"a": 1}}},
    {"classes": -1},
    {"classes": {"source": None}},
    {"calibration": 5},
    {"calibration": {"accept_threshold": {}}},
    {"calibration": {"source": []}},
    {"after_training": {"float": {}}},
]


@pytest.mark.parametrize("odd", ODD_RESULTS, ids=str)
def test_what_the_end_of_a_training_shows_is_checked(two, odd):
    folder = RunFolder(two / "good")
    result = folder.read_result()
    assert result is not None
    folder.require_result(result)
    (key,) = odd
    with pytest.raises(RunError, match=rf"good/result\.json does not hold what a finished run writes: '({key}|bytes)"):
        folder.require_result(result | odd)


def rows(two):
    return [(row["folder"], row["test_accuracy"]) for row in ask(refresh(two), "kind = 'run'")]


@pytest.mark.parametrize("how", ["noise", "cut", "empty", "trigger", "view", "link", "folder", "table"])
def test_an_index_that_is_not_ours_is_made_anew(how, two, tmp_path):
    expected = rows(two)
    file = index_file(two)
    content, before = bytearray(file.read_bytes()), b""
    if how == "noise":
        content[100:3000] = os.urandom(2900)
        file.write_bytes(content)
    elif how in ("cut", "empty"):
        file.write_bytes(content[: len(content) // 2 if how == "cut" else 0])
    elif how == "link":
        file.rename(tmp_path / "other.sqlite")
        before = (tmp_path / "other.sqlite").read_bytes()
        file.symlink_to(tmp_path / "other.sqlite")
        make_stale(two)
    elif how == "folder":
        file.unlink()
        file.mkdir()
    else:
        statements = {
            "trigger": "CREATE TRIGGER t AFTER INSERT ON folders BEGIN DELETE FROM folders; END",
            "view": "DROP VIEW runs; CREATE VIEW runs AS SELECT * FROM folders",
            "table": "DROP TABLE labels; CREATE TABLE labels (folder TEXT)",
        }
        with sqlite3.connect(file) as database:
            database.executescript(statements[how])
        database.close()
    assert rows(two) == expected
    if how == "link":
        assert (tmp_path / "other.sqlite").read_bytes() == before


def make_stale(two):
    os.utime(two / "good" / "result.json")


def test_a_file_of_the_same_size_and_date_is_read_again(two):
    (before,) = [accuracy for folder, accuracy in rows(two) if folder == "bad"]
    file = two / "bad" / "result.json"
    stat = file.stat()
    text = file.read_text().replace(f'"test_accuracy": {before}', f'"test_accuracy": {str(before)[:-1]}1')
    assert len(text) == stat.st_size
    file.write_text(text)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (after,) = [accuracy for folder, accuracy in rows(two) if folder == "bad"]
    assert after == float(f"{str(before)[:-1]}1") != before


def test_names_that_are_no_utf8_are_shown(two):
    shutil.copytree(two / "good", os.fsdecode(os.fsencode(two) + b"/\xff"))
    assert "\\udcff" in [row["folder"] for row in ask(refresh(two))]
