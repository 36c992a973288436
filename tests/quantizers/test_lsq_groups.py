"""Layers quantized in groups: the bits of each layer alone, and what stays out of a group."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from qtdog.conversion.attach import attach, attached
from qtdog.quantizers import lsq_groups


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(64, 5)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    attach(model, **options).enable()
    return model


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def bits(value: Tensor | None) -> Any:
    return None if value is None else (value.detach().clone().view(torch.int32).tolist(), value.stride())


def outcome(model: nn.Module, context: AbstractContextManager[Any]) -> list[Any]:
    """Return the bits of the output and of each gradient of one pass."""
    model.zero_grad()
    with context:
        output = model(IMAGES)
    (output * torch.arange(5.0)).sum().backward()
    return [bits(output), *(bits(value.grad) for value in model.parameters())]


def same(model: nn.Module) -> None:
    alone = outcome(model, nullcontext())
    assert outcome(model, attached(model).groups()) == alone


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_groups_give_the_bits_of_each_layer_alone(n_bits: int, granularity: str):
    model = net(bits=n_bits, granularity=granularity)
    with torch.no_grad():
        for weight in attached(model).weights_().values():
            weight[0] *= 30  # beyond the grid
    same(model)


@pytest.mark.parametrize("limit", [1, 100])
def test_the_size_of_groups_changes_no_bit(limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lsq_groups, "GROUP", limit)
    same(net())


@pytest.mark.parametrize(
    "options",
    [{"step_mode": "raw"}, {"step_mode": "frozen"}, {"quantizer": "ste"}, {"range": "symmetric"}],
    ids=str,
)
def test_other_members_and_options_are_as_alone(options: dict[str, Any]):
    same(net(**options))


def test_stochastic_rounding_draws_what_it_draws_alone():
    model = net(rounding="stochastic")
    attached(model).begin_step(3, 0.5)
    same(model)


def freeze_layer(model: nn.Sequential) -> None:
    next(iter(attached(model).weights_().values())).requires_grad_(False)


def freeze_step_sizes(model: nn.Sequential) -> None:
    for quantizer in attached(model).layers.values():
        quantizer.log_scale.requires_grad_(False)


def disable_one(model: nn.Sequential) -> None:
    attached(model).layers["2"].enabled = False


def average(model: nn.Sequential) -> None:
    quantizer = attached(model).layers["2"]
    quantizer._set_share_(0.5)


@pytest.mark.parametrize("change", [freeze_layer, freeze_step_sizes, disable_one, average])
def test_layers_unlike_the_others_are_as_alone(change: Callable[[nn.Sequential], None]):
    model = net()
    change(model)
    same(model)


def test_a_weight_of_two_layers_is_as_alone():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Flatten(), nn.Linear(108, 5))
    model[1].weight = model[0].weight
    attach(model).enable()
    same(model)


def test_a_layer_that_a_pass_leaves_out_gets_no_gradient():
    model = net()
    with attached(model).groups():
        features = model[:2](IMAGES)
    features.sum().backward()
    weights = attached(model).weights_()
    assert weights["0"].grad is not None
    assert weights["2"].grad is None
    assert attached(model).layers["2"].log_scale.grad is None


def test_a_layer_used_twice_in_a_pass_gets_both_gradients():
    model = net()
    results = []
    for context in (nullcontext(), attached(model).groups()):
        model.zero_grad()
        with context:
            (model(IMAGES).sum() + model(IMAGES * 2).square().sum()).backward()
        results.append([bits(value.grad) for value in model.parameters()])
    assert results[0] == results[1]


def test_a_pass_without_gradients_within_one_with_them():
    model = net()
    with attached(model).groups():
        with torch.no_grad():
            first = model[0](IMAGES)
        rest = model(IMAGES)
    assert not first.requires_grad
    rest.sum().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def test_other_values_of_the_parameters_count():
    model = net()
    doubled = {name: value.detach() * 2 for name, value in model.named_parameters() if "original" in name}
    with attached(model).groups():
        grouped = functional_call(model, doubled, (IMAGES,))
    assert torch.equal(grouped, functional_call(model, doubled, (IMAGES,)))
    assert not torch.equal(grouped, model(IMAGES))


def test_nothing_is_kept_after_an_error():
    model = net()
    groups = attached(model).groups()
    wrong = nn.Sequential(model[0], model[0])  # 3 channels in, 8 out
    with groups, pytest.raises(RuntimeError):
        wrong(IMAGES)
    assert outcome(model, groups) == outcome(model, nullcontext())


def test_a_changed_weight_counts_at_the_next_pass():
    model = net()
    groups = attached(model).groups()
    with groups:
        before = model(IMAGES)
    with torch.no_grad():
        attached(model).weights_()["0"].mul_(1.5)
    with groups:
        assert not torch.equal(model(IMAGES), before)


def test_layers_in_a_group_take_fewer_calls():
    model = net()
    calls = []
    for context in (nullcontext(), attached(model).groups()):
        with context:
            output = model(IMAGES)
        seen, waiting, n = set(), [output.grad_fn], 0
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                n += "Quantize" in node.name()
                waiting += [following for following, _ in node.next_functions]
        calls.append(n)
    assert calls == [4, 1]


def test_a_copy_has_groups_of_its_own_layers():
    model = net()
    copied, groups = copy.deepcopy((model, attached(model).groups()))
    with torch.no_grad():
        for weight in attached(model).weights_().values():
            weight.zero_()
    alone = outcome(copied, nullcontext())
    assert outcome(copied, groups) == alone
    assert all(groups.take(entry) is None for entry in model.modules())
