"""Weights in a file are known by their content: other weights under one name make another run."""

from __future__ import annotations

import pytest

from qtdog.core.config import config_hash
from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError
from qtdog.data.known_datasets import RotatedDigits
from qtdog.training.protocol import resolve


@pytest.fixture(scope="module")
def digits() -> RotatedDigits:
    return RotatedDigits()


def config(weights: str):
    return build_config([{"data": {"target": "15"}, "model": {"backbone": "digits_cnn", "weights": weights}}])


def test_other_weights_under_the_same_name_are_another_run(digits, tmp_path):
    file = tmp_path / "pre.pth"
    file.write_bytes(b"one")
    first = resolve(config(str(file)), digits)
    file.write_bytes(b"two")
    second = resolve(config(str(file)), digits)
    assert config_hash(first) != config_hash(second)
    with pytest.raises(ConfigError, match="not the ones that this run began with"):
        resolve(first, digits)


def test_the_same_weights_elsewhere_are_the_same_run(digits, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"one")
    (tmp_path / "b.pth").write_bytes(b"one")
    first, second = (resolve(config(str(tmp_path / name)), digits) for name in ("a.pth", "b.pth"))
    assert config_hash(first) == config_hash(second)


@pytest.mark.parametrize("weights", ["none", "imagenet"])
def test_weights_that_are_no_file_stay_as_they_are(digits, weights):
    assert resolve(config(weights), digits).model.weights_sha256 == ""
