"""`kill -9` at random moments, resumed each time: the benchmark's own command, with fewer kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_killed_and_resumed_gives_the_same_file():
    command = [sys.executable, ROOT / "benchmarks" / "kill_resume.py", "--kills", "3", "--steps", "120"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == 3
    assert report["identical"] == report["runs"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_leaves(tmp_path, number):
    out = tmp_path / "run"
    flags = ["--target", "75", "--batch-size", "4", "--image-size", "12", "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qtdog", "train", *flags, "--out", str(out), "--set", "train.eval_every=20"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(out.glob("checkpoint/step-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name}" in errors
    assert "--resume" in errors
    newest = sorted(out.glob("checkpoint/step-*"))[-1]
    assert (newest / "checkpoint.json").is_file()
