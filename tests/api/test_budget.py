"""Before long work: what a run will do is said first; the size that is chosen fits the time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qtdog
from qtdog.api import display
from qtdog.api.budget import (
    MARGIN,
    N_EVALUATIONS,
    SIZES,
    Budget,
    describe_run,
    device_text,
    estimate_runs,
    guess_step_s,
    parse_duration,
    slow_warning,
)
from qtdog.api.experiment import Members, Request, configure, make_plan
from qtdog.core.config import Config
from qtdog.core.config_io import is_method_preset
from qtdog.core.errors import ConfigError, DataError
from qtdog.data.known_datasets import RotatedDigits
from qtdog.runs.folder import RunFolder

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


FAST = 1e-4  # seconds of an image at 96 pixels


def asked(
    photos: Path | str,
    *,
    budget: Budget | None = None,
    image_s: float = FAST,
    presets: Any = (),
    out: Any = None,
    device: str = "cpu",
    **flags: Any,
) -> tuple[Config, list[str]]:
    """Return what a request becomes where training takes `image_s` for an image of 96 pixels, and what was said."""
    said: list[str] = []

    def measure(config: Config, dataset: Any, *, n_images: int, size: int) -> float:
        return n_images * image_s * (size / 96) ** 2

    allowed = replace(budget or Budget(), say=said.append, measure=measure, device=device)
    request = Request({"data": str(photos), **flags}, presets, (), Members(), out, budget=allowed)
    return configure(request)[1], said


def test_photographs_alone_get_one_small_model_that_ends_in_a_quarter_of_an_hour(image_tree: Path):
    config, said = asked(image_tree, target="night")
    assert (config.model.backbone, config.quantizer.name, config.averager.name) == (
        "tf_efficientnet_lite0",
        "lsq",
        "sma",
    )
    assert config.data.image_size == 224  # thirty images are passed over hundreds of times at any size
    assert config.train.steps == 600  # twice the least that counts as enough
    assert config.train.eval_every == 60
    assert len(said) == 1
    assert "Chosen for 15 min on this machine" in said[0]
    assert "224 × 224 pixels, 16 images per source; 600 steps take about 14 s, which fits." in said[0]
    assert "--budget 2h gives more time" in said[0]


def test_the_size_is_the_largest_that_fits_and_the_steps_fill_the_time(image_tree: Path):
    """Two sources of 15 training images, 16 images of each per step; 24 images are evaluated."""
    image_s = 0.05
    config, _ = asked(image_tree, budget=Budget(1200.0, asked=True), image_s=image_s, target="night")
    size = config.data.image_size

    def seconds(pixels: float, steps: int) -> float:
        evaluated = (N_EVALUATIONS + 2) * (2 * 3 + 18) / 3
        return MARGIN * image_s * (pixels / 96) ** 2 * (32 * steps + evaluated)

    assert size in SIZES
    larger = SIZES[SIZES.index(size) - 1]
    assert seconds(larger, 300) > 0.9 * 1200  # the arithmetic of the network grows about as the area
    assert 0.7 * 1200 < seconds(size, config.train.steps) < 1.15 * 1200
    assert len(str(config.train.steps).rstrip("0")) <= 2


def test_too_little_time_gets_the_least_and_a_word(image_tree: Path):
    config, said = asked(image_tree, budget=Budget(10.0, asked=True), image_s=0.05, target="night")
    assert (config.data.image_size, config.train.steps) == (64, 100)
    assert config.averager.params == {"start": config.start_step} == {"start": 40}  # sma alone would begin at the end
    assert "is the least and does not fit" in said[0]


@pytest.mark.parametrize(
    "flags", [{"backbone": "resnet50.tv_in1k"}, {"image_size": 64}, {"steps": 10}, {"train": {"steps": 10}}]
)
def test_whoever_says_what_to_train_is_not_overruled(image_tree: Path, flags: dict[str, Any]):
    config, said = asked(image_tree, target="night", **flags)
    assert not said
    assert config == asked(image_tree, budget=None, target="night", **flags)[0]
    assert config.model.backbone == "resnet50.tv_in1k"


def test_a_named_time_keeps_what_is_given(image_tree: Path):
    budget = Budget(600.0, asked=True)
    config, _ = asked(image_tree, budget=budget, target="night", steps=70, batch_size=5, bits=4)
    assert (config.train.steps, config.data.batch_size, config.quantizer.bits) == (70, 5, 4)
    config, _ = asked(image_tree, budget=budget, target="night", image_size=48, presets=["float"])
    assert (config.data.image_size, config.quantizer.name) == (48, "none")


def test_the_time_is_for_all_runs_together(image_tree: Path):
    budget = Budget(400.0, asked=True)
    one, _ = asked(image_tree, budget=budget, image_s=0.02, target="night", image_size=96)
    each, _ = asked(image_tree, budget=budget, image_s=0.02, target="all", image_size=96)
    assert each.train.steps == pytest.approx(one.train.steps / 3, rel=0.2)


def test_on_a_gpu_and_on_data_with_a_preset_nothing_changes_unasked(image_tree: Path, digits: RotatedDigits):
    said: list[str] = []
    on_gpu = Budget(say=said.append, device="cuda")
    config = configure(Request({"data": str(image_tree), "target": "night"}, budget=on_gpu))[1]
    assert (config.model.backbone, config.data.image_size) == ("resnet50.tv_in1k", 224)
    assert configure(Request({"target": "75"}, budget=Budget(say=said.append)))[1].model.backbone == "digits_cnn"
    assert not said


@pytest.mark.parametrize("seconds", [900.0, 10.0])
def test_the_same_command_finds_its_run_again(image_tree: Path, tmp_path: Path, seconds: float):
    out = tmp_path / "run"
    budget = Budget(seconds)
    first, _ = asked(image_tree, budget=budget, image_s=0.05, target="night", out=out)
    out.mkdir()
    RunFolder(out).claim(first, resume=False)
    again, said = asked(image_tree, budget=budget, image_s=0.01, target="night", out=out)
    assert again == first
    assert f"as chosen before for {out}" in said[0]


def test_on_a_gpu_the_same_command_finds_its_run_again_too(image_tree: Path, tmp_path: Path):
    out = tmp_path / "run"
    out.mkdir()
    fixed = {"target": "night", "image_size": 64, "out": out}
    first, _ = asked(image_tree, budget=Budget(300.0, asked=True), device="cuda", **fixed)
    assert (first.model.backbone, first.averager.name) == ("resnet50.tv_in1k", "none")
    RunFolder(out).claim(first, resume=False)
    assert asked(image_tree, budget=Budget(300.0, asked=True), device="cuda", **fixed)[0] == first


def test_data_with_a_preset_of_its_own_gets_only_a_length():
    config, said = asked("rotated-digits", budget=Budget(60.0, asked=True), target="75")
    own = asked("rotated-digits", target="75")[0]
    assert (config.model, config.data, config.quantizer) == (own.model, own.data, own.quantizer)
    assert config.train.steps != own.train.steps
    assert len(said) == 1


def test_a_target_that_there_is_not_is_refused_before_the_machine_is_measured(image_tree: Path):
    def measure(*_: Any, **__: Any) -> float:
        pytest.fail("no step is needed to see that")

    request = Request({"data": str(image_tree), "target": "nigth"}, budget=Budget(measure=measure, device="cpu"))
    with pytest.raises(ConfigError, match="unknown target domain 'nigth'; did you mean 'night'"):
        make_plan(request)


def test_one_domain_alone_gets_the_error_that_says_why(image_tree: Path, tmp_path: Path):
    for domain in ("indoor", "night"):
        shutil.rmtree(image_tree / domain)
    budget = Budget(measure=lambda *_, n_images, **__: n_images * FAST, device="cpu")
    request = Request({"data": str(image_tree), "target": "outdoor"}, out=tmp_path / "run", budget=budget)
    with pytest.raises(DataError, match=r"one domain \(outdoor\)"):
        make_plan(request)


@given(hours=st.integers(0, 99), minutes=st.integers(0, 999), seconds=st.integers(1, 999))
def test_times_add_up(hours: int, minutes: int, seconds: int):
    assert parse_duration(f"{hours}h{minutes}min {seconds}s") == 3600 * hours + 60 * minutes + seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 days", "-5min", "0min", "20min!", "1h x 3min"])
def test_what_is_no_time_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"no (length of )?time"):
        parse_duration(text)
