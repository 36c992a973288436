"""Merging folders of runs: nothing that was there is lost, whatever fails."""

from __future__ import annotations

import json
import os

import pytest

from qtdog.core.files import replacing_folder
from qtdog.runs.folder import RunFolder
from qtdog.sweep.merge import merge_folders


def make_run(path, *, sha256, step=2, finished=True):
    (path / "checkpoint" / f"step-{step:08d}").mkdir(parents=True)
    (path / "checkpoint" / f"step-{step:08d}" / "checkpoint.json").write_text("{}")
    (path / "config.yaml").write_text("{}")
    (path / "metrics.jsonl").write_text("")
    if finished:
        (path / "result.json").write_text(json.dumps({"model_sha256": sha256}))
        (path / "model.safetensors").write_text(sha256)


def test_missing_and_farther_runs_are_copied_and_others_stay(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for name, here, there in (("new", None, "a"), ("same", "a", "a"), ("other", "a", "b"), ("held", "a", "b")):
        make_run(theirs / name, sha256=there)
        if here:
            make_run(ours / name, sha256=here)
    make_run(theirs / "farther", sha256="a", step=4)
    make_run(ours / "farther", sha256="", step=2, finished=False)
    with RunFolder(ours / "held").lock():
        found = merge_folders([theirs], ours)
    assert (found.copied, found.kept) == (["farther", "new"], ["same"])
    assert (found.conflicts, found.busy) == (["other"], ["held"])
    assert (ours / "other" / "model.safetensors").read_text() == "a"
    assert (ours / "farther" / "result.json").is_file()


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "old").write_text("")
    with pytest.raises(OSError, match="new"), replacing_folder(folder) as new:
        assert not new.exists()  # nothing was made: the second rename fails
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert os.listdir(tmp_path) == ["run"]
    with replacing_folder(folder) as new:
        new.mkdir()
    assert os.listdir(tmp_path) == ["run"]
    assert not list(folder.iterdir())
