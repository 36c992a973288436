"""`qtdog inspect` says what lies in a file, and refuses what is none."""

from __future__ import annotations

import json

import pytest
import torch

from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.packing.packed_file import PackedModel, save_packed


def model(seed):
    noise = torch.randn(16, 500, generator=torch.Generator().manual_seed(seed)) * 5
    weight = QuantizedTensor(noise.round().clamp(-64, 63).to(torch.int8), torch.ones(16), QuantSpec(7))
    told = {"backbone": "digits_cnn", "classes": [str(digit) for digit in range(20)], "target_domain": None}
    return PackedModel({"conv.weight": weight}, {"bias": torch.ones(16)}, told | {"accuracy": {"source": 0.91234}})


@pytest.fixture
def run(tmp_path):
    one = model(0)
    save_packed(tmp_path / "model.safetensors", one.quantized, one.rest, one.metadata)
    return tmp_path


def test_one_model_and_its_weights(qtdog, run):
    found = qtdog("inspect", run, "--weights")
    assert found.code == 0
    for text in ("one model", "digits_cnn", "… (20)", "source 0.9123", "times the file", "bytes+zstd", "16 × 500"):
        assert text in found.out


def test_weights_that_are_left_in_float_are_named_with_their_share(qtdog, tmp_path):
    one = model(0)
    rest = one.rest | {"head.weight": torch.ones(10, 200)}
    save_packed(tmp_path / "model.safetensors", one.quantized, rest, one.metadata)
    table = qtdog("inspect", tmp_path).out
    assert "20.0 % of all values: head.weight (20.0 %)" in table  # 2,000 of 8,000 + 16 + 2,000
    left = json.loads(qtdog("inspect", tmp_path, "--json").out)["left_in_float"]
    assert left == {"head.weight": pytest.approx(2000 / 10016)}


def test_an_ensemble(qtdog, tmp_path):
    save_ensemble(tmp_path / "two.safetensors", [model(0), model(1)], {"kind": "eoq"})
    found = qtdog("inspect", tmp_path / "two.safetensors")
    assert "ensemble of 2" in found.out
    assert "float32 of one member" in found.out


def test_json(qtdog, run):
    told = json.loads(qtdog("inspect", run / "model.safetensors", "--json", "--weights").out)
    assert told["size"]["bytes"] == (run / "model.safetensors").stat().st_size
    assert told["metadata"]["backbone"] == "digits_cnn"
    (weight,) = told["weights"]
    assert weight["entropy_bits_per_code"] < weight["bits_per_code"] < 1.04 * weight["entropy_bits_per_code"]
    assert told["size"]["entropy_bits_per_code"] == pytest.approx(weight["entropy_bits_per_code"])


def test_what_is_no_model_is_refused(qtdog, tmp_path):
    for path in (tmp_path, tmp_path / "missing.safetensors", __file__):
        found = qtdog("inspect", path)
        assert found.code == 1
        assert "error:" in found.err
