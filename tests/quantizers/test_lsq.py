import math
from typing import Any

import pytest
import torch

from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import QuantizerOptions, encode
from qtdog.quantizers.lsq import LSQ, MIN_RAW_FRAC
from qtdog.quantizers.step_size_init import initial_scale


def enabled(weight, spec, mode="log", **options) -> Any:
    lsq = LSQ(weight, spec, QuantizerOptions(step_mode=mode, **options))
    lsq.enable_(weight)
    return lsq


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
    assert torch.equal(lsq.step_sizes(), lsq.start_scale * MIN_RAW_FRAC)
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


@pytest.mark.parametrize("mode", ["log", "raw"])
def test_step_change_is_one_at_the_start_and_follows_the_step_sizes(mode):
    weight = torch.randn(200, 20)  # some of so many steps do not survive log and exp to the last bit
    lsq = enabled(weight, QuantSpec(5), mode)
    assert lsq.step_change().tolist() == [1.0] * 200
    with torch.no_grad():
        next(lsq.parameters()).copy_((lsq.start_scale * 3).log() if mode == "log" else lsq.start_scale * 3)
    torch.testing.assert_close(lsq.step_change(), torch.full((200,), 3.0))


def test_a_frozen_step_is_no_parameter_stays_at_its_start_and_lets_the_weight_train():
    weight = torch.randn(4, 20)
    weight[:, :3] *= 10
    weight.requires_grad_()
    learned, frozen = enabled(weight, QuantSpec(3), "log"), enabled(weight, QuantSpec(3), "frozen")
    assert list(frozen.parameters()) == []
    assert frozen.step_change() is None
    assert torch.equal(frozen.step_sizes(), initial_scale(weight, QuantSpec(3)))
    grad = torch.randn(4, 20)
    (d_weight,) = torch.autograd.grad(frozen(weight), weight, grad)
    (expected,) = torch.autograd.grad(learned(weight), weight, grad)
    assert torch.equal(d_weight, expected)
    assert 0 < (d_weight == 0).float().mean() < 0.5
    assert torch.equal(frozen(weight), frozen.quantized(weight).dequantize())


@pytest.mark.parametrize("init", ["lsq", "lsq_plus", "minmax", "mse"])
@pytest.mark.parametrize("mode", ["log", "raw", "frozen"])
def test_the_start_that_was_asked_for_is_taken(mode, init):
    weight = torch.randn(4, 20)
    expected = initial_scale(weight, QuantSpec(4), init)
    torch.testing.assert_close(enabled(weight, QuantSpec(4), mode, init=init).step_sizes(), expected, rtol=1e-6, atol=0)
    others = [initial_scale(weight, QuantSpec(4), other) for other in ("lsq", "lsq_plus", "minmax", "mse")]
    assert sum(torch.allclose(expected, other, rtol=1e-3) for other in others) == 1


def test_a_symmetric_range_has_no_lowest_code():
    weight = -torch.rand(3, 50) - 1
    full, symmetric = enabled(weight, QuantSpec(2)), enabled(weight, QuantSpec(2), range="symmetric")
    for lsq in (full, symmetric):
        lsq.log_scale.data.fill_(math.log(0.1))
    assert (full.quantized(weight).codes == -2).all()
    assert (symmetric.quantized(weight).codes == -1).all()
    assert symmetric.quantized(weight).spec.levels == "symmetric"
    assert torch.equal(symmetric(weight), symmetric.quantized(weight).dequantize())


def test_the_steps_gradient_has_the_rounding_that_was_drawn():
    weight = torch.randn(6, 40, requires_grad=True)
    lsq = enabled(weight.detach(), QuantSpec(3), "raw", rounding="stochastic")
    lsq.begin_step_(weight, 3, 0.0)
    grad = torch.randn(6, 40)
    out = lsq(weight)
    out.backward(grad)
    u = weight.detach() / lsq.start_scale[:, None]
    codes = out.detach() / lsq.start_scale[:, None]
    inside = (u > -4) & (u < 3)
    assert ((codes - u).abs() > 0.6)[inside].any()  # the draw did decide
    expected = (grad * torch.where(inside, codes - u, codes)).sum(1) * lsq.grad_scale
    assert lsq.scale.grad is not None
    torch.testing.assert_close(lsq.scale.grad, expected, rtol=1e-4, atol=1e-5)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad * inside)


def test_there_are_no_codes_before_it_is_enabled():
    weight = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="LSQ has no codes"):
        LSQ(weight, QuantSpec(4)).quantized(weight)


def test_unknown_step_mode():
    with pytest.raises(ConfigError, match="did you mean 'log'"):
        LSQ(torch.ones(2, 2), QuantSpec(4), QuantizerOptions(step_mode="logg"))
