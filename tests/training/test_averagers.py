"""The running mean, SWA and SMA against a few lines that do the same, and their place in a run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from qtdog.conversion.attach import attach, sites
from qtdog.core.errors import ConfigError
from qtdog.quantizers.lsq import LSQ
from qtdog.quantizers.step_size_init import initial_scale
from qtdog.training.averagers import BMA, EMA, SMA, SWA, Average, Averager, swapped
from qtdog.training.build import AVERAGERS, build_components

N_STEPS = 12


class Walker(nn.Module):
    """A network whose state is another after every update: weights, a constant, a mask and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.register_buffer("constant", torch.rand(50, generator=torch.Generator().manual_seed(7)))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("count", torch.tensor(0))

    def walk_(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        self.weight.data.copy_(torch.randn(3, 4, generator=generator))
        self.get_buffer("mask").fill_(step % 2 == 0)
        self.get_buffer("count").fill_(step)
        return self.weight.detach().clone()


def follow(averager: Averager, network: Walker, first: int, last: int) -> dict[int, Tensor]:
    walked = {}
    for step in range(first, last + 1):
        walked[step] = network.walk_(step)
        averager.after_step(step, network)
        averager.after_evaluation(step, 1.0)
    return walked


@pytest.mark.parametrize(("t0", "start"), [(0, 0), (4, 0), (2, 5), (12, 0)])
def test_sma_is_the_papers_recursion(t0, start):
    sma, network = SMA({"start": t0}, start), Walker()
    begin, expected = max(t0, start + 1), None
    for step, weight in follow(sma, network, 1, N_STEPS).items():
        if step >= begin:
            mean = weight if expected is None else expected
            expected = ((step - begin) * mean + weight) / (step - begin + 1)
    found = sma.evaluated()
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found["weight"], expected, rtol=0, atol=1e-6)
    assert sma.final() is None  # selection chooses among the averages
    assert sma.kept(N_STEPS) == f"average of updates {begin} to {N_STEPS}"


@pytest.mark.parametrize("mode", ["log", "raw", "frozen"])
@pytest.mark.parametrize("make", [SMA, SWA])
def test_dequantized_weights_are_averaged_and_step_sizes_refitted(make, mode):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    handle = attach(network, bits=3, exclude=["1"], step_mode=mode)
    handle.enable()
    params = {"start": 1, "weights": "dequantized"} | ({"every": 1} if make is SWA else {})
    averager, resumed, seen = make(params, 0), make(params, 0), []
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        averager.after_step(step, network)
        first = network[0]
        assert isinstance(first, nn.Linear)
        seen.append(first.weight.detach().clone())
    mean = torch.stack(seen).mean(0)
    tensors, extra = averager.state()
    resumed.restore(tensors, json.loads(json.dumps(extra)))
    for one in (averager, resumed):
        state = one.final() or one.evaluated()
        assert state is not None
        torch.testing.assert_close(state["0.parametrizations.weight.original"], mean, rtol=0, atol=1e-6)
        with swapped(network, state):
            layer = network[0]
            assert isinstance(layer, nn.Linear)
            error = (layer.weight - mean).square().sum()
            steps = handle.layers["0"].step_sizes()
            assert steps is not None
            torch.testing.assert_close(steps, initial_scale(mean, handle.layers["0"].spec, "mse"))
            for factor in (0.8, 0.95, 1.05, 1.25):
                scale = (steps * factor)[:, None]
                assert error <= ((mean / scale).round().clamp(-4, 3) * scale - mean).square().sum() * 1.02
    assert "grids" in extra


def test_dequantized_weights_are_for_step_sizes_that_are_free(short_config, digits):
    averager = {"name": "sma", "params": {"weights": "dequantized"}}
    with pytest.raises(ConfigError, match="quantizer 'ste' has no free ones"):
        build_components(short_config(averager=averager, quantizer={"name": "ste"}), digits)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_ema_is_that_of_timm(decay):
    network = Walker()
    ema = EMA({"start": 1, "decay": decay}, 0)
    network.walk_(1)
    theirs = ModelEmaV3(network, decay=decay, use_warmup=False)
    ema.after_step(1, network)
    for step in range(2, N_STEPS + 1):
        network.walk_(step)
        ema.after_step(step, network)
        theirs.update(network, step=step)
    found = ema.evaluated()
    assert found is not None
    torch.testing.assert_close(found["weight"], theirs.module.get_parameter("weight"), rtol=0, atol=1e-6)
    assert ema.final() is None
    assert ema.kept(N_STEPS) == f"exponential average of updates 1 to {N_STEPS}"


@pytest.mark.parametrize(("begin", "every", "start"), [(1, 1, 0), (3, 4, 0), (3, 4, 6), (12, 5, 0)])
def test_swa_is_the_mean_of_every_nth_update(begin, every, start):
    swa, network = SWA({"start": begin, "every": every}, start), Walker()
    walked = follow(swa, network, 1, N_STEPS)
    counted = [walked[step] for step in range(max(begin, start + 1), N_STEPS + 1, every)]
    found = swa.final()
    assert found is not None
    torch.testing.assert_close(found["weight"], torch.stack(counted).mean(0), rtol=0, atol=1e-6)
    assert swa.evaluated() is None


@pytest.mark.parametrize(("beta", "start"), [(0.5, 0), (0.5, 7), (1.0, 0), (3.0, 2)])
def test_bma_weighs_by_the_density_of_the_beta_distribution(beta, start):
    bma, network = BMA({"beta": beta}, start), Walker()
    bma.n_steps = N_STEPS
    counted = list(follow(bma, network, start + 1, N_STEPS).values())
    places = (torch.arange(len(counted), dtype=torch.float64) + 0.5) / len(counted)
    both = torch.full((1,), beta, dtype=torch.float64)
    density = torch.distributions.Beta(both, both).log_prob(places).exp()
    expected = (density[:, None, None] * torch.stack(counted)).sum(0) / density.sum()
    found = bma.final()
    assert found is not None
    torch.testing.assert_close(found["weight"], expected.float(), rtol=0, atol=1e-5)
    assert bma.evaluated() is None


@pytest.mark.parametrize("make", [SMA, SWA])
def test_before_its_first_update_an_averager_keeps_nothing(make):
    averager = make({"start": 100}, 0)
    follow(averager, Walker(), 1, N_STEPS)
    assert averager.evaluated() is None
    assert averager.final() is None
    assert averager.kept(6).startswith("weights after update 6 (")


@pytest.mark.parametrize("name", [name for name in AVERAGERS if name != "none"])
def test_only_floats_are_averaged_and_what_never_changes_stays(name):
    averager, network = AVERAGERS[name]({"start": 1, "every": 1} if name == "swa" else {}, 0), Walker()
    if name in ("sma", "ema"):
        averager = AVERAGERS[name]({"start": 1}, 0)
    follow(averager, network, 1, N_STEPS)
    state = averager.final() or averager.evaluated()
    assert state is not None
    assert set(state) == {"weight", "constant"}
    assert torch.equal(state["constant"], network.get_buffer("constant"))
    with swapped(network, state):
        assert network.get_buffer("count").item() == N_STEPS  # of the last update
        assert torch.equal(network.weight, state["weight"])
    assert torch.equal(network.weight, Walker().walk_(N_STEPS))


@pytest.mark.parametrize("name", list(AVERAGERS))
@pytest.mark.parametrize("stop", [1, 5, 9])
def test_an_averager_goes_on_bit_for_bit_from_its_saved_state(name, stop):
    params = {"sma": {"start": 2}, "ema": {"start": 2}, "swa": {"start": 2, "every": 3}}.get(name, {})
    whole, first, second = (AVERAGERS[name](params, 1) for _ in range(3))
    follow(whole, Walker(), 1, N_STEPS)
    follow(first, Walker(), 1, stop)
    tensors, extra = first.state()
    second.restore({key: value.clone() for key, value in tensors.items()}, extra)
    follow(second, Walker(), stop + 1, N_STEPS)
    assert second.kept(N_STEPS) == whole.kept(N_STEPS)
    for ours, theirs in ((second.evaluated(), whole.evaluated()), (second.final(), whole.final())):
        assert (ours is None) == (theirs is None)
        assert all(torch.equal(value, (theirs or {})[key]) for key, value in (ours or {}).items())
    for key, value in whole.state()[0].items():
        assert torch.equal(value, second.state()[0][key]), key


def test_the_order_of_memory_changes_no_bit():
    """A checkpoint brings tensors back contiguous, whatever they were."""
    torch.manual_seed(0)
    states = [torch.randn(3, 5, 7, 2) for _ in range(9)]
    one, other = Average(), Average()
    for step, state in enumerate(states, 1):
        one.add_(step, {"w": state})
        other.add_(step, {"w": state.to(memory_format=torch.channels_last)})
    assert torch.equal(one.mean["w"], other.mean["w"])


def test_merged_averages_are_the_average_of_all():
    torch.manual_seed(0)
    states = [torch.randn(40, dtype=torch.float32) for _ in range(10)]
    parts = [Average(), Average(), Average()]
    for step, state in enumerate(states, 1):
        parts[0 if step < 3 else 2].add_(step, {"w": state})
    first = parts[0].mean["w"].clone()
    total = Average()
    for part in parts:
        total.merge_(part)
    torch.testing.assert_close(total.mean["w"], torch.stack(states).mean(0), rtol=0, atol=1e-6)
    assert (total.n, total.first, total.last) == (10, 1, 10)
    assert torch.equal(parts[0].mean["w"], first)  # merging leaves the parts alone


def test_step_sizes_are_averaged_geometrically():
    network = nn.Linear(3, 1, bias=False)
    attach(network, bits=4).enable()
    (site,) = sites(network)
    assert isinstance(site.quantizer, LSQ)
    quantizer = site.quantizer
    sma = SMA({"start": 1}, 0)
    for step, size in enumerate((0.01, 0.04), 1):
        quantizer.log_scale.data.fill_(math.log(size))
        sma.after_step(step, network)
    with swapped(network, sma.evaluated()):
        assert quantizer.step_sizes().item() == pytest.approx(0.02)
    assert quantizer.step_sizes().item() == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("make", "params", "message"),
    [
        (SWA, {"every": 0}, "every of averager 'swa' must lie in 1"),
        (SMA, {"begin": 3}, "averager 'sma' has no hyper-parameter 'begin'"),
        (SMA, {"start": 2.5}, "must be int"),
    ],
)
def test_wrong_hyper_parameters_are_refused(make, params, message):
    with pytest.raises(ConfigError, match=message):
        make(params, 0)
