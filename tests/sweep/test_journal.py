"""Merging folders of runs: nothing that was there is lost, whatever fails."""

from __future__ import annotations

import hashlib
import json
import os
import sys

import pytest

from qtdog.core.files import replacing_folder
from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import merge_folders, progress_of


def make_run(path, *, content, step=2, finished=True):
    (path / "checkpoint" / f"step-{step:08d}").mkdir(parents=True)
    (path / "checkpoint" / f"step-{step:08d}" / "checkpoint.json").write_text("{}")
    (path / "config.yaml").write_text("{}")
    (path / "metrics.jsonl").write_text("")
    if finished:
        digest = hashlib.sha256(content.encode()).hexdigest()
        (path / "result.json").write_text(json.dumps({"model_sha256": digest}))
        (path / "model.safetensors").write_text(content)


def test_missing_and_farther_runs_are_copied_and_others_stay(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for name, here, there in (("new", None, "a"), ("same", "a", "a"), ("other", "a", "b"), ("held", "a", "b")):
        make_run(theirs / name, content=there)
        if here:
            make_run(ours / name, content=here)
    make_run(theirs / "farther", content="a", step=4)
    make_run(ours / "farther", content="", step=2, finished=False)
    with RunFolder(ours / "held").lock():
        found = merge_folders([theirs], ours)
    assert (found.copied, found.kept) == (["farther", "new"], ["same"])
    assert (found.conflicts, found.busy) == (["other"], ["held"])
    assert (ours / "other" / "model.safetensors").read_text() == "a"
    assert (ours / "farther" / "result.json").is_file()


def test_what_a_link_points_to_is_not_copied(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    make_run(theirs / "sound", content="a")
    make_run(theirs / "linked", content="a")
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    (theirs / "linked" / "figure.png").symlink_to(secret)
    make_run(theirs / "below", content="a")
    (theirs / "below" / "checkpoint" / "more").symlink_to(tmp_path)
    found = merge_folders([theirs], ours)
    assert (found.copied, sorted(found.damaged)) == (["sound"], ["below", "linked"])
    assert os.listdir(ours) == ["sound"]


@pytest.mark.parametrize("next_start", ["merge", "train"])
def test_a_run_that_a_kill_left_aside_is_put_back(next_start, tmp_path, capfd):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    make_run(theirs / "run", content="a", step=4)
    make_run(ours / "run", content="", step=2, finished=False)
    child = os.fork()
    if not child:
        renames = []

        def die(event, _arguments):
            renames.extend([event] if event == "os.rename" else [])
            if len(renames) == 2:
                os._exit(9)

        sys.addaudithook(die)
        merge_folders([theirs], ours)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (ours / "run").exists()
    assert len(os.listdir(ours)) == 1
    if next_start == "merge":
        assert merge_folders([theirs], ours).copied == ["run"]
    else:
        with RunFolder(ours / "run").lock():
            pass
        assert (ours / "run" / "config.yaml").is_file()
    assert os.listdir(ours) == ["run"]
    assert progress_of(ours / "run")[1] == (4 if next_start == "merge" else 2)


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
