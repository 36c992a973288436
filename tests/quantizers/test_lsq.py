import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.grid import encode
from qtdog.quantizers.lsq import DEAD_LAYER_SCALE, LSQ, MIN_RAW_SCALE, initial_scale
from qtdog.quantizers.options import QuantizerOptions


def enabled(weight, spec, mode="log"):
    lsq = LSQ(weight, spec, QuantizerOptions(step_mode=mode))
    lsq.enable_(weight)
    return lsq


@given(st.integers(2, 8), st.sampled_from([0, 1, None]), st.sampled_from(["log", "raw"]), st.integers(0, 10**6))
def test_forward_is_the_dequantized_codes_bit_for_bit(bits, axis, mode, seed):
    weight = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(seed))
    lsq = enabled(weight, QuantSpec(bits, axis), mode)
    value = lsq.quantized(weight)
    assert torch.equal(lsq(weight), value.dequantize())
    assert value.codes.min() >= value.spec.qmin
    assert value.codes.max() <= value.spec.qmax


@pytest.mark.parametrize("bits", [2, 7, 8])
def test_start_is_twice_the_mean_magnitude_over_the_root_of_qp(bits):
    weight = torch.randn(3, 50)
    expected = 2 * weight.abs().mean(1) / math.sqrt(2 ** (bits - 1) - 1)
    torch.testing.assert_close(initial_scale(weight, QuantSpec(bits)), expected)
    whole = initial_scale(weight, QuantSpec(bits, None))
    torch.testing.assert_close(whole, 2 * weight.abs().mean().reshape(1) / math.sqrt(2 ** (bits - 1) - 1))


def test_a_dead_filter_and_a_dead_layer_get_a_usable_step():
    weight = torch.randn(4, 9)
    weight[1] = 0
    weight[2] *= 1e-12
    scale = initial_scale(weight, QuantSpec(7))
    torch.testing.assert_close(scale[1:3], scale[[0, 3]].mean().expand(2))
    assert (initial_scale(torch.zeros(2, 3), QuantSpec(7)) == DEAD_LAYER_SCALE).all()
    lsq = enabled(weight, QuantSpec(7))
    assert torch.isfinite(lsq(weight)).all()


def test_raw_gradient_scale_counts_the_weights_of_one_channel():
    weight = torch.randn(16, 8, 3, 3)
    assert LSQ(weight, QuantSpec(7), QuantizerOptions(step_mode="raw")).grad_scale == pytest.approx(
        1 / math.sqrt(8 * 9 * 63)
    )
    assert LSQ(weight, QuantSpec(7, None), QuantizerOptions(step_mode="raw")).grad_scale == pytest.approx(
        1 / math.sqrt(16 * 8 * 9 * 63)
    )


def test_gradients_of_the_two_step_modes_are_related_by_the_chain_rule():
    weight, grad = torch.randn(5, 30), torch.randn(5, 30)
    log, raw = (enabled(weight, QuantSpec(4), mode) for mode in ("log", "raw"))
    log(weight).backward(grad)
    raw(weight).backward(grad)
    assert log.log_scale.grad is not None
    assert raw.scale.grad is not None
    expected = raw.scale.grad / raw.grad_scale * raw.scale.detach()
    torch.testing.assert_close(log.log_scale.grad, expected, rtol=1e-4, atol=1e-5)


def test_raw_step_below_zero_is_floored_and_can_come_back():
    weight = torch.randn(2, 8)
    lsq = enabled(weight, QuantSpec(4), "raw")
    lsq.scale.data.fill_(-0.1)
    assert lsq.step_sizes().tolist() == pytest.approx([MIN_RAW_SCALE] * 2)
    lsq(weight).sum().backward()
    assert lsq.scale.grad is not None
    assert (lsq.scale.grad != 0).any()


def test_adam_moves_a_log_step_by_a_share_of_itself_and_a_raw_one_by_the_learning_rate():
    """Why the log scale is the default: Adam cancels LSQ's gradient scale."""
    weight = torch.randn(4, 100) * 0.02
    for mode, name in (("log", "log_scale"), ("raw", "scale")):
        lsq = enabled(weight, QuantSpec(7), mode)
        before = lsq.step_sizes().detach()
        optimizer = torch.optim.Adam(lsq.parameters(), lr=1e-4)
        (lsq(weight) * torch.randn(4, 100)).sum().backward()
        optimizer.step()
        share = ((lsq.step_sizes().detach() - before) / before).abs()
        assert getattr(lsq, name).grad is not None
        if mode == "log":
            torch.testing.assert_close(share, torch.full((4,), 1e-4), rtol=0.05, atol=1e-6)
        else:
            assert (share > 0.01).all()


def test_noise_and_entropy_of_gaussian_codes_are_the_measured_ones():
    """formulas page: with LSQ's start 8 … 4 bits give these noise levels and entropies."""
    weight = torch.randn(64, 36_864, generator=torch.Generator().manual_seed(0))
    expected = {8: (0.041, 4.87), 7: (0.058, 4.36), 6: (0.083, 3.86), 5: (0.119, 3.34), 4: (0.174, 2.80)}
    for bits, (noise, entropy) in expected.items():
        value = encode(weight, initial_scale(weight, QuantSpec(bits)), QuantSpec(bits))
        assert (value.dequantize() - weight).std().item() == pytest.approx(noise, abs=0.001)
        share = value.codes.unique(return_counts=True)[1] / weight.numel()
        assert -(share * share.log2()).sum().item() == pytest.approx(entropy, abs=0.015)


def test_low_precision_weights_are_computed_in_float32():
    weight = torch.randn(3, 8, dtype=torch.bfloat16)
    assert enabled(weight, QuantSpec(4))(weight).dtype == torch.bfloat16


def test_unknown_step_mode():
    with pytest.raises(ConfigError, match="did you mean 'log'"):
        LSQ(torch.ones(2, 2), QuantSpec(4), QuantizerOptions(step_mode="logg"))
