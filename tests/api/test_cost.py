"""Before long work: what a run will do is said first, and that it would take days; a dry run trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qtdog
from qtdog.api import display
from qtdog.api.cost import describe_run, device_text, estimate_runs, guess_step_s, slow_warning
from qtdog.core.config import Config
from qtdog.core.config_io import is_method_preset
from qtdog.data.digits import RotatedDigits

SMALL: dict[str, Any] = {"steps": 4, "batch_size": 4, "image_size": 12, "eval_every": 2}


def test_a_run_is_described(digits: RotatedDigits):
    text = describe_run(Config.make("digits", target="75"), digits)
    assert text == f"digits_cnn, 28 × 28 pixels, 160 images per step, 500 steps, {device_text()}"


def test_days_on_a_processor_are_told_with_the_preset_that_takes_minutes(digits: RotatedDigits):
    protocol = Config.make("domainbed", target="75")
    text = slow_warning(protocol, digits, 3, device="cpu")
    assert text is not None
    assert "resnet50.tv_in1k at 224 pixels for 5,000 steps takes about" in text
    assert "days each" in text
    assert "--preset digits takes minutes here" in text
    assert slow_warning(protocol, digits, device="cuda") is None
    assert slow_warning(Config.make("digits", target="75"), digits, device="cpu") is None
    one, two = (guess_step_s(protocol, digits, cores=n) for n in (1, 2))
    assert one is not None
    assert two == pytest.approx(one / 2)


def test_an_estimate_counts_every_missing_step(digits: RotatedDigits):
    configs = [Config.make("digits", target="75", steps=100, seed=seed) for seed in range(3)]
    found = estimate_runs(configs, digits, done_steps=80, measure=lambda config, dataset, threads: 0.5)
    assert found is not None
    assert found.seconds == pytest.approx((300 - 80) * 0.5 * 1.2)
    assert str(found) == "about 2 min (0.5 s per step, a few steps made just now)"
    assert estimate_runs([], digits) is None


def test_a_method_goes_on_top_of_the_data_sets_own_preset(tmp_path: Path):
    assert is_method_preset("lsq")
    assert not any(map(is_method_preset, ("domainbed", "digits", "pacs-lite", "mine.yaml")))
    result = qtdog.train(target="75", preset="lsq-4bit", out=tmp_path / "run", progress=False, **SMALL)
    assert isinstance(result, qtdog.RunResult)
    assert (result.config.model.backbone, result.config.quantizer.bits) == ("digits_cnn", 4)


def test_each_title_says_which_run_it_is_and_the_plan_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in (("MEASURED_STEPS", 1), ("MEASURED_S", 0.0), ("WORTH_SAYING_S", 0.0)):
        monkeypatch.setattr(display, name, value)
    qtdog.train(target="75", preset="digits", members=2, out=tmp_path, **SMALL)
    told = capsys.readouterr().err
    assert "unseen: 75 (seed 0, 1 of 2)" in told
    assert "unseen: 75 (seed 1, 2 of 2)" in told
    assert told.count("digits_cnn, 12 × 12 pixels, 20 images per step, 4 steps") == 1
    assert "for this run, " in told
    assert "with the 1 after it" in told
    assert told.count("for this run") == 2
