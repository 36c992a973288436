"""What ends a run early: a signal, and the watch that finds its network collapsed."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from qtdog.cli.main import main
from qtdog.conversion.attach import attach
from qtdog.conversion.inspect import LayerHealth, layer_health
from qtdog.core.errors import CollapseError, Interrupted
from qtdog.core.progress import RunCallback
from qtdog.data.known_datasets import RotatedDigits
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Score, SourceRecord
from qtdog.training.checkpoint import latest_checkpoint
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run
from qtdog.training.stop import HealthWatch, StopRequest, chance_accuracy, held_signals

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


HEALTHY = LayerHealth("conv", 0.01, 0.0, 1.02)
ILL = LayerHealth("conv", 0.9, 0.6, 0.05)


def record(step: int, accuracy: float) -> SourceRecord:
    return SourceRecord(step, True, {"a": Score(accuracy, 1.0, 10)})


def watch(config, warnings: list[str]) -> HealthWatch:
    return HealthWatch(config, chance=0.2, warn=warnings.append)


def test_health_sees_clipped_dead_and_moved():
    model = nn.Linear(100, 4, bias=False)
    torch.manual_seed(0)
    nn.init.normal_(model.weight)
    quantizer = attach(model, bits=7).layers["weight"]
    quantizer.enable_(model.parametrizations.weight.original)  # pyright: ignore
    assert layer_health(model)[0].problems == []
    latent = model.get_parameter("parametrizations.weight.original")
    with torch.no_grad():
        quantizer.get_parameter("log_scale").sub_(np.log(20))
    (layer,) = layer_health(model)
    expected = (latent.abs() >= 63 * quantizer.step_sizes()[:, None]).float().mean().item()  # pyright: ignore
    assert layer.clipped_frac == pytest.approx(expected, abs=0.01)
    assert layer.step_change == pytest.approx(1 / 20, rel=1e-4)
    assert "clipped" in layer.problems[0]
    with torch.no_grad():
        quantizer.get_parameter("log_scale").add_(np.log(20))
        latent[1] *= 1e-4
    assert layer_health(model)[0].dead_frac == 0.25


def test_chance_is_the_best_constant_answer():
    labels = np.array([0, 0, 0, 1, 2, 2, 1, 1])
    parts = [np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7])]
    best = max(np.mean([(labels[part] == c).mean() for part in parts]) for c in range(3))
    assert chance_accuracy(labels, parts, 3) == pytest.approx(best)


def test_each_layer_is_warned_of_once(short_config):
    warnings: list[str] = []
    look = watch(short_config(), warnings)
    look([HEALTHY], [record(2, 0.9)])
    assert warnings == []
    look([ILL], [record(2, 0.9), record(4, 0.8)])
    look([ILL], [record(2, 0.9), record(4, 0.8), record(6, 0.8)])
    assert len(warnings) == 1
    assert "'conv': 90% of its weights are clipped; 60% of its channels round to zero" in warnings[0]


@pytest.mark.parametrize("accuracies", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.5)])
def test_held_out_images_of_one_class_show_no_collapse(short_config, accuracies):
    """Their best constant answer is always right, so that no accuracy is above chance and none has fallen to it."""
    chance = chance_accuracy(np.array([1, 1, 1, 0]), [np.array([0]), np.array([1, 2])], 2)
    assert chance == 1.0
    records = [record(2 * i, accuracy) for i, accuracy in enumerate(accuracies)]
    HealthWatch(short_config(), chance=chance, warn=pytest.fail)([HEALTHY], records)


def test_a_fall_to_chance_stops_with_a_diagnosis(short_config):
    config = short_config(quantizer={"step_mode": "raw", "start_step": 2})
    with pytest.raises(CollapseError, match=r"fell from 90\.0% at step 2 to 20\.0% at step 4.*step_mode=log") as caught:
        watch(config, [])([ILL], [record(2, 0.9), record(4, 0.2)])
    assert caught.value.report["layers"][0]["problems"]


@pytest.mark.parametrize(
    ("chance", "best", "warned"),
    [
        (0.1, 0.14, True),
        (0.1, 0.16, False),
        (1 / 345, 0.004, True),  # 345 classes: 1 % is little of the way, and three times chance
        (1 / 345, 0.01, False),
        (0.9, 0.905, True),
        (0.9, 0.92, False),
        (1.0, 1.0, False),  # all held-out images have one class
    ],
)
@pytest.mark.parametrize("layers", [[], [HEALTHY]])
def test_a_run_that_ends_without_having_learned_says_so(short_config, chance, best, warned, layers):
    config = short_config(optimizer={"lr": 0.5}, train={"steps": 50})
    warnings: list[str] = []
    look = HealthWatch(config, chance, warnings.append)
    last = config.train.steps
    look(layers, [record(last - 1, best)])
    assert warnings == []
    look(layers, [record(last - 1, best), record(last, chance - 0.001)])
    assert len(warnings) == warned
    assert not warned or f"{chance:.1%}. Try a lower learning rate (--lr 0.1; it was 0.5)" in warnings[0]
    shorter = short_config(train={"steps": 49})
    HealthWatch(shorter, chance, pytest.fail)(layers, [record(49, best)])


@pytest.mark.parametrize("accuracies", [[0.2, 0.2], [0.9, 0.3], [0.39, 0.19]])
def test_a_network_that_never_learned_or_only_dips_goes_on(short_config, accuracies):
    records = [record(2 * i, accuracy) for i, accuracy in enumerate(accuracies)]
    watch(short_config(), [])([ILL], records)


def test_before_quantization_nothing_is_looked_at(short_config):
    watch(short_config(), [])([], [record(0, 0.9), record(2, 0.1)])


def test_raw_steps_under_adam_collapse_and_the_run_says_why(tmp_path, short_config):
    """What the control `lsq-raw-adam` does to a large network, here with a faster step size."""
    digits = RotatedDigits()
    config = short_config(
        data={"target": "75", "batch_size": 32, "image_size": 12},
        quantizer={"step_mode": "raw", "start_step": 80},
        optimizer={"lr": 0.002, "step_size_lr": 200},
        train={"steps": 160, "eval_every": 20},
    )
    folder = RunFolder(tmp_path)
    warnings: list[str] = []
    with pytest.raises(CollapseError, match="the network collapsed"):
        run(resolve(config, digits), digits, folder, callbacks=RunCallbacks(warn=warnings.append))
    assert any("round to zero" in text for text in warnings)
    report = json.loads(folder.diagnosis_file.read_text())
    assert report["best_source_accuracy"] > 2 * report["source_accuracy"]
    assert not folder.result_file.exists()
    checkpoint = latest_checkpoint(folder.checkpoints, print)
    assert checkpoint is not None
    assert checkpoint.step == report["step"]
