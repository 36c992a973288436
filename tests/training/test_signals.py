"""Signals: a checkpoint on request, nothing lost by `kill -9`, and a stop that came late ends the whole command."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from qtdog.cli.main import main
from qtdog.core.errors import Interrupted
from qtdog.core.progress import RunCallback
from qtdog.runs.folder import RunFolder
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run
from qtdog.training.signals import StopRequest, held_signals

ROOT = Path(__file__).parents[2]


@pytest.mark.stress
def test_killed_and_resumed_gives_the_same_file():
    command = [sys.executable, ROOT / "tests" / "stress" / "kill_resume.py", "--kills", "2", "--steps", "60"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == 2
    assert report["identical"] == report["runs"]


FLAGS = ["train", "--target", "75", "--batch-size", "4", "--image-size", "12", "--steps", "100000"]
FLAGS += ["--set", "train.eval_every=20", "--out"]


def left(out: Path, number: signal.Signals, code: object, errors: str) -> None:
    """Check how `qtdog train` ended after a signal, and that it can go on."""
    assert code == 128 + number, errors
    assert f"stopped by {number.name}" in errors
    assert "--resume" in errors
    newest = sorted(out.glob("checkpoint/step-*"))[-1]
    assert (newest / "checkpoint.json").is_file()


def test_a_signal_writes_a_checkpoint_and_leaves(tmp_path):
    out, number = tmp_path / "run", signal.SIGTERM
    command = [sys.executable, "-m", "qtdog", *FLAGS, str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("checkpoint/step-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    left(out, number, process.returncode, errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_checkpoints_writes_one(tmp_path, number, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qtdog", *FLAGS, str(tmp_path / "run")])
    updates = itertools.count(1)
    hook = register_optimizer_step_post_hook(lambda *_: signal.raise_signal(number) if next(updates) == 3 else None)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        hook.remove()
    left(tmp_path / "run", number, ended.value.code, capsys.readouterr().err)
    assert [path.name for path in (tmp_path / "run" / "checkpoint").glob("step-*")] == ["step-00000003"]


def test_a_signal_that_nothing_checked_for_ends_the_block():
    before = signal.getsignal(signal.SIGTERM)  # a library that another test imported may have put its own

    def block():
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM") as stopped:
        block()
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_the_block_is_not_hidden_by_a_signal():
    def block():
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        block()


class SignalAtTheEnd(RunCallback):
    """Send SIGTERM when the last checkpoint is written: no check comes after it."""

    def on_save(self, step: int) -> None:
        if step == 6:
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_behind_the_last_step_ends_the_command_and_the_run_is_finished_later(digits, short_config, tmp_path):
    config, folder = resolve(short_config(), digits), RunFolder(tmp_path)
    with pytest.raises(Interrupted):
        run(config, digits, folder, callbacks=RunCallbacks(SignalAtTheEnd()))
    assert folder.read_result() is None
    assert run(config, digits, folder, resume=True)["selected_step"] in (4, 6)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_is_held_until_the_block_has_ended_and_a_second_one_acts(number: int, error: type[BaseException]):
    done: list[int] = []

    def leave(_number: int, _frame: object) -> None:
        raise error

    def work(times: int) -> None:
        with held_signals():
            for _ in range(times):
                signal.raise_signal(number)
            done.append(times)

    before = signal.signal(number, leave)
    try:
        for times in (1, 2):
            with pytest.raises(error):
                work(times)
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)
    assert done == [1]
