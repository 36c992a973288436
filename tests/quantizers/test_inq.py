"""INQ: the levels against the formula in float64, exact shares, and frozen weights that nothing moves."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from qtdog.conversion.attach import attach, attached, sites
from qtdog.conversion.load import load_into
from qtdog.conversion.save import save
from qtdog.core.config_io import build_config
from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import QuantizerOptions
from qtdog.quantizers.inq import DEAD_LAYER_LEVEL, INQ, largest_level, power_of_two_codes

BITS = range(2, 9)


def spec_of(bits: int, axis: int | None = None) -> QuantSpec:
    return QuantSpec(bits, axis, levels="power_of_two")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(weights: list[float], bits: int) -> list[float]:
    """Zhou et al., Eq. 2 to 4, by trying every level in float64, where the boundaries are exact."""
    n1 = next(n for n in range(200, -200, -1) if 2.0**n <= 4 * max(map(abs, weights)) / 3)
    n2 = n1 + 1 - 2 ** (bits - 2)
    levels = [0.0, *(2.0**n for n in range(n2, n1 + 1))]
    result = []
    for weight in weights:
        hits = [beta for alpha, beta in itertools.pairwise(levels) if (alpha + beta) / 2 <= abs(weight) < 3 * beta / 2]
        assert len(hits) <= 1
        result.append(math.copysign(hits[0], weight) if hits else 0.0)
    return result


@pytest.mark.parametrize("bits", BITS)
@given(
    # every binade that a level or half a level can have, so that boundaries come up
    points=st.lists(
        st.tuples(st.sampled_from([0.5, 0.74999994, 0.75, 0.7500001, 0.99999994, 0.6]), st.integers(-70, 3)),
        min_size=1,
        max_size=12,
    ),
    noise=st.integers(0, 2**31),
)
@example(points=[(0.75, 0)], noise=0)
@example(points=[(0.74999994, 0)], noise=0)
def test_levels_are_those_of_the_formula(bits: int, points: list[tuple[float, int]], noise: int) -> None:
    at_boundaries = torch.tensor([mantissa * 2.0**exponent for mantissa, exponent in points])
    weight = torch.cat([at_boundaries, -at_boundaries, draw(8, seed=noise)])
    spec = spec_of(bits)
    scale = largest_level(weight, QuantSpec(4, None))
    value = power_of_two_codes(weight, scale, spec)
    points_of = dict(zip(range(spec.qmin, spec.qmax + 1), spec.points().tolist(), strict=True))
    levels = [points_of[code] * scale.item() for code in value.tolist()]
    assert levels == formula(weight.tolist(), bits)


@pytest.mark.parametrize("exponent", [-126, -20, -1, 0, 1, 5, 126])
def test_the_largest_level_changes_at_three_quarters_of_a_power_of_two_and_nowhere_else(exponent: int) -> None:
    boundary = torch.tensor(0.75 * 2.0**exponent)
    below = torch.nextafter(boundary, torch.tensor(0.0))
    power = torch.tensor(2.0**exponent)
    rows = torch.stack([boundary, below, power, torch.nextafter(power, torch.tensor(0.0))])
    for value, level in zip(rows, [1.0, 0.5, 1.0, 1.0], strict=True):
        assert largest_level(value.reshape(1, 1), QuantSpec(4, 0)).item() == level * 2.0**exponent


@pytest.mark.parametrize("axis", [0, 1, None])
def test_levels_are_shared_along_the_axis(axis: int | None) -> None:
    weight = draw(5, 4, 3) * torch.tensor([1.0, 0.03, 7.0, 300.0]).reshape(1, 4, 1)
    scale = largest_level(weight, QuantSpec(4, axis))
    slices = [weight] if axis is None else list(weight.unbind(axis))
    assert scale.tolist() == [2.0 ** math.floor(math.log2(4 * part.abs().max().item() / 3)) for part in slices]


@pytest.mark.parametrize("bits", [5, 7, 8])
def test_the_relative_error_is_at_most_a_third_and_hardly_depends_on_the_bits(bits: int) -> None:
    weight = draw(1, 200_000)
    spec = spec_of(bits, 0)
    scale = largest_level(weight, QuantSpec(4, 0))
    table = spec.points()[power_of_two_codes(weight, scale, spec).long() - spec.qmin] * scale
    covered = weight.abs() >= 0.75 * scale * spec.points()[spec.qmax + 1]
    error = ((table - weight) / weight)[covered].abs()
    assert covered.float().mean() > 0.98
    assert error.max() <= 1 / 3 + 1e-6
    assert error.square().mean().sqrt().item() == pytest.approx(0.19, abs=0.01)


def test_a_weight_that_outgrew_the_levels_gets_the_largest() -> None:
    codes = power_of_two_codes(torch.tensor([1.6, -40.0]), torch.ones(1), spec_of(3))
    assert codes.tolist() == [2, -2]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 101])
@pytest.mark.parametrize("kind", ["ties", "zeros", "normal"])
def test_each_stage_freezes_exactly_its_share_largest_first(size: int, kind: str) -> None:
    weight = {"ties": torch.ones(1, size), "zeros": torch.zeros(1, size), "normal": draw(1, size)}[kind]
    inq = INQ(weight, QuantSpec(4))
    inq.enable_(weight)
    for stage, share in enumerate(inq.stages):
        inq.begin_step_(weight, 0, stage / 4)
        assert inq.frozen.count_nonzero() == round(share * size)
        frozen, rest = weight.abs()[inq.frozen], weight.abs()[~inq.frozen]
        assert not (len(frozen) and len(rest)) or frozen.min() >= rest.max()
        if kind != "normal":  # of equal weights the first
            assert inq.frozen[0, : len(frozen)].all()
        assert inq.packs == inq.selectable == (len(rest) == 0)
    assert torch.equal(inq(weight), inq.quantized(weight).dequantize())


def test_stages_begin_at_equal_parts_of_the_quantized_steps_and_a_repeated_call_changes_nothing() -> None:
    weight, steps = draw(10, 10), 147
    inq = INQ(weight, QuantSpec(7), QuantizerOptions(stages=tuple((i + 1) / 49 for i in range(49))))
    inq.enable_(weight)
    counts = []
    for step in range(steps):
        for _ in range(2):
            inq.begin_step_(weight, step, step / steps)
        counts.append(int(inq.frozen.count_nonzero()))
    assert counts == [round(100 * (step // 3 + 1) / 49) for step in range(steps)]


def test_a_call_out_of_turn_never_melts_what_is_frozen() -> None:
    weight = draw(4, 16)
    inq = INQ(weight, QuantSpec(7))
    inq.enable_(weight)
    inq.begin_step_(weight, 0, 0.9)
    before = inq(weight)
    inq.begin_step_(draw(4, 16, seed=1), 0, 0.0)
    assert torch.equal(inq(draw(4, 16, seed=2)), before)


def test_dead_filters_take_the_levels_of_the_layer_and_a_dead_layer_some() -> None:
    weight = draw(4, 9)
    weight[1] = 0
    weight[2] *= 1e-12
    scale = largest_level(weight, QuantSpec(4, 0))
    assert (scale[1:3] == scale[[0, 3]].max()).all()
    assert (largest_level(torch.zeros(2, 3), QuantSpec(4, 0)) == DEAD_LAYER_LEVEL).all()


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Twelve quantized steps, each preceded by the preparation that the training loop makes."""
    for step in steps:
        attached(model).begin_step(step, step / 12)
        optimizer.zero_grad()
        images = draw(6, 1, 4, 4, seed=step)
        nn.functional.cross_entropy(model(images), torch.arange(6) % 3).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_frozen_weights_stay_whatever_momentum_and_decay_do_to_the_latent_ones(kind: str) -> None:
    model = make()
    optimizer = optimizer_of(kind, model)
    for _ in range(5):  # fill the momentum
        optimizer.zero_grad()
        model(draw(6, 1, 4, 4)).square().sum().backward()
        optimizer.step()
    attach(model, quantizer="inq", bits=5).enable()
    kept: dict[str, tuple[torch.Tensor, ...]] = {}
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        for site in sites(model):
            quantizer, weight = site.quantizer, site.weight
            assert isinstance(quantizer, INQ)
            if site.name in kept:
                frozen, values, latent = kept[site.name]
                assert quantizer.frozen[frozen].all()
                assert torch.equal(quantizer(weight)[frozen], values)
                assert not torch.equal(weight[frozen], latent)  # so that the test can fail
            frozen = quantizer.frozen.clone()
            kept[site.name] = frozen, quantizer(weight).detach()[frozen], weight.detach()[frozen]
    assert attached(model).selectable


def test_only_what_still_trains_gets_a_gradient() -> None:
    weight = draw(3, 8).requires_grad_()
    inq = INQ(weight, QuantSpec(4))
    inq.enable_(weight)
    grad = draw(3, 8, seed=1)
    inq(weight).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.where(inq.frozen, 0.0, grad))


@pytest.mark.parametrize("granularity", ["channel", "layer"])
@pytest.mark.parametrize("bits", [2, 7, 8])
def test_the_file_gives_the_trained_model_bit_for_bit(tmp_path, granularity: str, bits: int) -> None:
    model = make()
    attach(model, quantizer="inq", bits=bits, granularity=granularity).enable()
    train(model, optimizer_of("sgd", model), range(12))
    save(model, tmp_path / "model.safetensors")
    plain = load_into(tmp_path / "model.safetensors", make(1))
    images = draw(6, 1, 4, 4, seed=9)
    assert torch.equal(plain(images), model.eval()(images))
    scales = {site.plain_name: site.quantizer for site in sites(model)}
    for name, quantizer in scales.items():
        assert isinstance(quantizer, INQ)
        magnitude = plain.state_dict()[name].abs()
        assert set(magnitude[magnitude > 0].frexp().mantissa.tolist()) <= {0.5}  # powers of two


def test_a_file_saved_between_stages_holds_the_half_frozen_floats(tmp_path) -> None:
    model = make()
    attach(model, quantizer="inq", bits=7).enable()
    assert not attached(model).selectable
    save(model, tmp_path / "model.safetensors")
    images = draw(6, 1, 4, 4)
    assert torch.equal(load_into(tmp_path / "model.safetensors", make(1))(images), model.eval()(images))


@pytest.mark.parametrize("stop_at", [1, 3, 5, 9, 10])
def test_a_restored_twin_goes_on_bit_for_bit(stop_at: int) -> None:
    model, twin = make(), make(1)
    optimizers = []
    for one in (model, twin):
        attach(one, quantizer="inq", bits=6)
        optimizers.append(optimizer_of("adam", one))
    attached(model).enable()
    train(model, optimizers[0], range(stop_at))
    twin.load_state_dict(model.state_dict())
    attached(twin).set_enabled(True)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert attached(twin).selectable == attached(model).selectable == (stop_at > 9)
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        train(one, optimizer, range(stop_at, 12))
    assert attached(twin).selectable
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_memory_format_and_low_precision_are_kept() -> None:
    weight = draw(4, 3, 2, 2).to(torch.bfloat16).to(memory_format=torch.channels_last)
    inq = INQ(weight, QuantSpec(5))
    inq.enable_(weight)
    inq.begin_step_(weight, 0, 0.75)
    for tensor in (inq(weight), inq.codes, inq.frozen, inq.quantized(weight).codes):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert inq(weight).dtype == torch.bfloat16
    assert torch.equal(inq(weight).float(), inq.quantized(weight).dequantize())  # powers of two fit


def test_the_memory_format_does_not_decide_what_is_frozen() -> None:
    weight = torch.ones(4, 3, 2, 2)  # all equal: the first in logical order
    frozen = []
    for one in (weight, weight.to(memory_format=torch.channels_last)):
        inq = INQ(one, QuantSpec(5))
        inq.enable_(one)
        frozen.append(inq.frozen)
    assert torch.equal(*frozen)
    assert frozen[0].flatten()[:24].all()


def test_a_run_with_fewer_quantized_steps_than_stages_is_refused() -> None:
    """Its last stage would never begin, and nothing could be shipped."""
    changes = {"quantizer": {"name": "inq", "start_step": 3}, "train": {"steps": 6}}
    with pytest.raises(ConfigError, match=r"4 stages, but only 3 of train\.steps 6 are quantized"):
        build_config([changes])
    assert build_config([changes, {"quantizer": {"stages": [0.5, 0.75, 1.0]}}]).start_step == 3
    assert build_config([changes, {"quantizer": {"name": "lsq"}}]).start_step == 3
