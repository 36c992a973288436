"""The harnesses of this folder with a few inputs each; their full numbers are commands."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INPUTS = runpy.run_path(str(HERE / "hostile_inputs.py"))
SERVERS = runpy.run_path(str(HERE / "hostile_servers.py"))
SIGNALS = runpy.run_path(str(HERE / "signal_chains.py"))
KILLS = runpy.run_path(str(HERE / "kill_everywhere.py"))
COUNTS = {"runs": 10, "archives": 300, "weights": 200, "images": 300}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", INPUTS["KINDS"])
def test_hostile_inputs_are_sound_or_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert INPUTS["run"](kind, COUNTS[kind], seed=1) == []


@pytest.mark.stress
def test_hundreds_of_hostile_run_folders_are_sound_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert INPUTS["run"]("runs", 300, seed=2) == []


def test_hostile_servers_end_in_the_whole_file_or_a_reason():
    behaviors = [(name, *one) for name, one in SERVERS["BEHAVIORS"].items()]
    assert len(behaviors) >= 40
    watched = SERVERS["WATCH"]["watched"](tempfile.gettempdir(), forbidden=SERVERS["WATCH"]["STARTS"])
    with ThreadPoolExecutor(len(behaviors)) as pool, watched as seen:
        found = list(pool.map(lambda one: (one[0], SERVERS["problem"]([one[2]], one[1])), behaviors))
    assert {name: text for name, text in found if text and name != "length too short"} == {}
    assert seen == []


def test_the_watch_sees_what_no_input_may_do(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_text("before")
    with INPUTS["watched"](tmp_path / "in") as seen:
        (tmp_path / "in" / "a").write_text("x")
        (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
        (tmp_path / "in" / "link").write_text("x")
        (tmp_path / "in" / "a").rename(tmp_path / "b")
        subprocess.run(["true"], check=True)
        shutil.rmtree(tmp_path / "in")
        os.mkdir(tmp_path / "in")
    assert [one.split(" ")[0] for one in seen] == [f"{tmp_path}/out", f"{tmp_path}/b", "subprocess.Popen"]
    with pytest.raises(TimeoutError, match="hangs"):
        INPUTS["hang"](0, None)


@pytest.mark.stress
@pytest.mark.parametrize("how", KILLS["HOWS"])
@pytest.mark.parametrize("work", ["sweep", "export-onnx", "export-openvino"])
def test_long_work_goes_on_after_a_kill_or_a_full_disk(work, how, tmp_path):
    assert KILLS["run"](work, how, 4, tmp_path) == []


@pytest.mark.stress
@pytest.mark.parametrize("work", SIGNALS["WORKS"])
def test_signals_at_random_lose_nothing(work, tmp_path):
    faults, n_chains, n_signals = SIGNALS["run"](work, 2, 0, tmp_path)
    assert faults == []
    assert n_signals >= n_chains == 2


@pytest.mark.parametrize("work", KILLS["WORKS"])
@pytest.mark.parametrize("how", KILLS["HOWS"])
def test_work_goes_on_after_a_kill_or_a_full_disk(work, how, tmp_path):
    assert KILLS["run"](work, how, 2 if work == "train" else 4, tmp_path) == []
