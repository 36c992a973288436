"""Temperature and threshold of a single run: fitted on validation images of the sources, kept in its file."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.config import config_hash
from qtdog.packing.packed_file import load_packed
from qtdog.runs.folder import RunFolder
from qtdog.training.calibration import (
    LabeledLogits,
    calibrate_answers,
    choose_accept_threshold,
    fit_temperature,
    measure_acceptance,
)
from qtdog.training.load_model import load_model
from qtdog.training.protocol import make_protocol, resolve
from qtdog.training.run import run

confidences = st.lists(st.floats(0.0625, 1, width=32), min_size=1, max_size=60)


@given(confidences, st.floats(0, 0.99))
def test_a_threshold_abstains_on_at_most_the_share_and_on_more_only_above_it(values, abstain):
    confidence = torch.tensor(values)
    threshold = choose_accept_threshold(confidence, abstain)
    assert (confidence.double() < threshold).double().mean() <= abstain + 1e-9
    above = confidence[confidence.double() > threshold]
    if len(above):  # a larger one would abstain on more
        assert (confidence < above.min()).double().mean() > abstain - 1e-9


def test_all_right_leaves_the_temperature_at_one():
    logits = torch.eye(3) * 2
    assert fit_temperature(logits, torch.arange(3)) == 1.0


def test_what_a_threshold_does_is_measured_with_its_interval():
    found = measure_acceptance(torch.full((100,), 0.9), torch.arange(100) >= 5, 0.5)
    assert (found.coverage, found.error) == (1.0, 0.05)
    assert found.interval == pytest.approx((0.0215, 0.1118), abs=1e-3)  # Wilson, 5 of 100
    nothing = measure_acceptance(torch.tensor([0.5]), torch.tensor([True]), 0.9)
    assert (nothing.coverage, nothing.interval) == (0.0, None)


def test_the_test_images_change_neither_temperature_nor_threshold():
    generator = torch.Generator().manual_seed(0)
    source, test = (
        LabeledLogits(3 * torch.randn(1, 200, 4, generator=generator), torch.arange(200) % 4) for _ in range(2)
    )
    alone, both = calibrate_answers(source, None, 0.2), calibrate_answers(source, test, 0.2)
    assert (alone.temperature, alone.accept_threshold) == (both.temperature, both.accept_threshold)
    assert both.report["source"]["accept"]["coverage"] == 0.8
    assert both.report["test"]["after"]["ece"] < both.report["test"]["before"]["ece"]
    assert calibrate_answers(None, test, 0.2).accept_threshold is None


@pytest.fixture
def finished(short_config, digits, tmp_path):
    """A short run: its configuration, folder and result."""

    def make(**changes):
        config = resolve(short_config(**changes), digits)
        folder = RunFolder(tmp_path / config_hash(config))
        return config, folder, run(config, digits, folder)

    return make


def test_a_run_keeps_what_fits_its_own_validation_images(finished, digits):
    config, folder, result = finished(train={"abstain": 0.25})
    model = load_model(folder.model_file)
    held_out = np.concatenate(list(make_protocol(config, digits).selection_sets().values()))
    size = config.data.image_size
    images = torch.from_numpy(np.stack([digits.read_resized(int(index), size) for index in held_out]))
    labels = torch.from_numpy(digits.class_index[held_out]).long()
    with torch.no_grad():
        logits = model(model.prepare(images))
    assert model.info.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-4)
    best = model.probabilities(images).max(1)
    threshold = model.info.accept_threshold
    assert threshold is not None
    assert (best.values >= threshold - 1e-6).float().mean() == pytest.approx(0.75, abs=0.01)
    accept = result["calibration"]["source"]["accept"]
    answered = best.values >= threshold - 1e-6
    wrong = (best.indices != labels)[answered].float().mean()
    assert accept["error"] == pytest.approx(float(wrong), abs=0.01)
    assert accept["n"] == len(held_out)
    assert result["calibration"]["test"]["accept"]["n"] == len(digits.indices("75"))
    assert json.loads(folder.result_file.read_text())["calibration"] == result["calibration"]


def test_who_trained_on_all_images_has_nothing_to_fit_on(finished):
    _, folder, result = finished(data={"train_on_heldout": True}, train={"selection": "last"})
    metadata = load_packed(folder.model_file).metadata
    assert (metadata["temperature"], metadata["accept_threshold"]) == (1.0, None)
    assert set(result["calibration"]) == {"temperature", "accept_threshold", "test"}


def test_the_share_renames_no_run_that_does_not_set_it(short_config):
    assert config_hash(short_config()) == config_hash(short_config(train={"abstain": 0.1}))
    assert config_hash(short_config()) != config_hash(short_config(train={"abstain": 0.2}))
