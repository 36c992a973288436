"""The watch over a quantized run: it warns by layer, stops at a collapse, and leaves good runs alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.conversion.inspect import LayerHealth, layer_health
from qtdog.core.errors import CollapseError
from qtdog.data.known_datasets import RotatedDigits
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Score, SourceRecord
from qtdog.training.checkpoint import latest_checkpoint
from qtdog.training.collapse import HealthWatch, chance_accuracy
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run

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
