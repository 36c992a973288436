"""Rounding noise against the uniform law, where the answer is known."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from qtdog.analysis.quantization_noise import N_BINS, describe_noise, kl_to_uniform, layer_noise
from qtdog.core.errors import ModelError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import encode
from qtdog.quantizers.step_size_init import initial_scale
from qtdog.training.shared_steps import latent_name


def test_truly_uniform_noise_has_the_divergence_of_the_floor():
    rng = np.random.Generator(np.random.Philox(0))
    n = 36_864
    found = [kl_to_uniform(rng.uniform(-0.5, 0.5, n)) for _ in range(40)]
    floor = (N_BINS - 1) / (2 * n)
    assert floor == pytest.approx(0.0013, abs=1e-4)
    assert abs(np.mean(found) - floor) < 4 * np.std(found) / np.sqrt(40)


def test_other_laws_are_told_from_it():
    rng = np.random.Generator(np.random.Philox(0))
    lopsided = describe_noise(rng.uniform(-0.5, 0.5, 20_000).clip(0.0), 0.0, 0.0)
    assert lopsided.kl > 100 * lopsided.floor
    assert lopsided.mean > 20 * lopsided.mean_error
    even = describe_noise(rng.uniform(-0.5, 0.5, 20_000), 0.0, 0.0)
    assert abs(even.mean) < 4 * even.mean_error
    assert even.std == pytest.approx(12**-0.5, rel=0.02)
    assert even.positive_frac == pytest.approx(0.5, abs=0.02)


def test_gaussian_channels_of_different_scales_are_uniform_in_units_of_their_own_steps():
    torch.manual_seed(0)
    weight = torch.randn(64, 576) * torch.logspace(-2, 1, 64)[:, None]
    spec = QuantSpec(7)
    value = encode(weight, initial_scale(weight, spec), spec)
    noise, clipped, moved = layer_noise(weight, value)
    found = describe_noise(noise, clipped, moved)
    assert found.kl - found.floor < 0.001
    assert moved == 0
    raw = (value.dequantize() - weight).flatten().numpy()
    assert kl_to_uniform(raw / np.ptp(raw)) > 0.3


def test_clipped_and_moved_weights_are_counted_apart():
    value = QuantizedTensor(torch.tensor([[1, -2, 0, 1]], dtype=torch.int8), torch.tensor([1.0]), QuantSpec(2))
    noise, clipped, moved = layer_noise(torch.tensor([[5.0, -2.2, 0.9, 1.25]]), value)
    assert (clipped, moved) == (0.25, 0.25)
    assert noise.tolist() == pytest.approx([0.2, -0.25])


def test_a_grid_without_a_step_has_no_uniform_law():
    value = QuantizedTensor(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), QuantSpec(3, levels="power_of_two"))
    with pytest.raises(ModelError, match="no common step size"):
        layer_noise(torch.zeros(1, 1), value)
    with pytest.raises(ModelError, match="no weight"):
        describe_noise(np.zeros(0), 1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.parametrizations.weight.original", "a.weight"),
        ("parametrizations.in_proj_weight.original", "in_proj_weight"),
        ("a.parametrizations.weight.0.log_scale", None),
        ("a.bias", "a.bias"),
    ],
)
def test_latent_weights_get_their_plain_names(name: str, plain: str | None):
    assert latent_name(name) == plain


@pytest.mark.stress
def test_a_fresh_process_knows_the_averager_of_a_run():
    code = (
        "import qtdog.training.shared_steps\n"
        "from qtdog.training.averagers import AVERAGERS\n"
        "assert AVERAGERS['sma'] and AVERAGERS['swad']"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
