"""Compiled training passes: quantizers in one graph, the updates of the plain pass, refusals where there is no such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtdog.core.config import AFTER_TRAINING, Config
from qtdog.core.errors import ConfigError, ModelError
from qtdog.data.dataset import DomainSubset
from qtdog.models.feature_layers import FEATURE_LAYERS
from qtdog.models.network import Network
from qtdog.objectives.base import OBJECTIVES
from qtdog.quantizers.lsq import lsq_quantize
from qtdog.quantizers.registry import QUANTIZERS
from qtdog.training.build import build_components, compiler_missing
from qtdog.training.components import Components, Trainable, compiled_pass
from qtdog.training.loop import begin_step, update
from qtdog.training.step_rules import STEP_RULES

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
DRAWS = ("noise-fresh", "noise-matched", "noise-then-round")


def made(short_config: Callable[..., Config], digits: DomainSubset, backend: str, **changes: Any) -> Components:
    short: dict[str, Any] = {
        "data": {"target": "75", "batch_size": 4, "image_size": 8, "workers": 0},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "quantizer": {"name": "lsq", "bits": 4, "start_step": 2},
    }
    plan = {"train": {"steps": 4, "eval_every": 2, "compile": backend}}
    components = build_components(short_config(**(short | changes | plan)), digits)
    components.network.train()
    return components


def trained(components: Components) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of four updates, two of them quantized, and the network behind them."""
    losses = []
    for step in range(4):
        begin_step(components, step)
        losses.append(update(components, components.batches.batch(step), step).item())
    return losses, components.network.state_dict()


def assert_alike(
    short_config: Callable[..., Config], digits: DomainSubset, backend: str = "aot_eager", **changes: Any
) -> None:
    expected, found = (trained(made(short_config, digits, name, **changes)) for name in ("off", backend))
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("rule", ["plain", pytest.param("sam", marks=pytest.mark.stress)])
def test_updates_are_those_of_the_plain_pass(
    rule: str, short_config: Callable[..., Config], three_digits: DomainSubset
):
    """With SAM the weights are moved behind their quantizers, which the graph must see."""
    assert_alike(short_config, three_digits, step_rule={"name": rule})


def needs(section: str, name: str) -> dict[str, Any]:
    if section == "feature_layer":
        return {"model": {"feature_layer": name}} | ({"objective": {"name": "arm"}} if name == "context" else {})
    if section == "quantizer":
        stages = {"stages": (0.5, 1.0)} if name == "inq" else {}
        return {"quantizer": {"name": name, "start_step": None if name in AFTER_TRAINING else 2} | stages}
    return {section: {"name": name}} | ({"model": {"feature_layer": "context"}} if name == "arm" else {})


MEMBERS = [("quantizer", name) for name in QUANTIZERS if name not in DRAWS]
MEMBERS += [("objective", name) for name in OBJECTIVES] + [("step_rule", name) for name in STEP_RULES]
MEMBERS += [("feature_layer", name) for name in FEATURE_LAYERS if FEATURE_LAYERS[name].COMPILES]


@pytest.mark.stress
@pytest.mark.parametrize(("section", "name"), MEMBERS)
def test_every_member_that_is_not_refused_makes_the_updates_of_the_plain_pass(
    section: str, name: str, short_config: Callable[..., Config], three_digits: DomainSubset
):
    assert_alike(short_config, three_digits, **needs(section, name))


@pytest.mark.stress
@pytest.mark.skipif(bool(compiler_missing(torch.device("cpu"))), reason="there is no C++ compiler")
@pytest.mark.parametrize("name", ["lsq", "ste", "none"])
def test_updates_of_a_compiler_are_those_of_the_plain_pass(
    name: str, short_config: Callable[..., Config], three_digits: DomainSubset
):
    start = None if name == "none" else 2
    assert_alike(short_config, three_digits, "inductor", quantizer={"name": name, "start_step": start})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(({"quantizer": {"name": name, "start_step": 2}}, f"quantizer '{name}' draws numbers") for name in DRAWS),
        ({"quantizer": {"rounding": "stochastic", "start_step": 2}}, "rounding=stochastic"),
        ({"quantizer": {"activation_bits": 8, "start_step": 2}}, "activations"),
        ({"model": {"feature_layer": "mixstyle"}}, "feature layer 'mixstyle'"),
    ],
    ids=str,
)
def test_what_is_no_graph_is_refused(
    changes: dict[str, Any], reason: str, short_config: Callable[..., Config], three_digits: DomainSubset
):
    with pytest.raises(ConfigError, match=reason):
        made(short_config, three_digits, "aot_eager", **changes)


def test_passes_that_are_repeated_are_refused(short_config: Callable[..., Config], three_digits: DomainSubset):
    data = {"target": "75", "batch_size": 4, "image_size": 8}
    plan = {"steps": 4, "accumulate": 2, "compile": "aot_eager"}
    config = short_config(data=data, objective={"name": "coral"}, train=plan)
    with pytest.raises(ConfigError, match=r"objective 'coral' with train\.accumulate"):
        build_components(config, three_digits)


def test_a_missing_compiler_is_named():
    assert compiler_missing(torch.device("cpu"), which=lambda name: None) == "there is no C++ compiler (g++ or clang++)"
    assert compiler_missing(torch.device("cpu"), which=lambda name: "/usr/bin/g++") == ""


class Breaks(nn.Module):
    """Decides by a value, which no graph can."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.sum().item() > 0 else -images


def test_a_network_that_is_no_graph_is_an_error():
    network = Network(Breaks(), nn.Linear(2, 2), freeze_bn=False)
    with pytest.raises(ModelError, match=r"cannot make one graph .* leave out train\.compile"):
        Trainable(network, "aot_eager")(torch.ones(3, 2))


def test_many_networks_of_a_process_have_their_own_graphs():
    """Torch keeps eight graphs of a function, and refuses the next one."""
    for _ in range(10):
        network = Network(nn.Linear(2, 2), nn.Linear(2, 2), freeze_bn=False)
        images = torch.randn(3, 2)
        torch.testing.assert_close(compiled_pass(network, "eager")(images, None)[1], network(images))


def test_quantizers_enabled_by_a_checkpoint_are_noticed(
    short_config: Callable[..., Config], three_digits: DomainSubset
):
    other = made(short_config, three_digits, "off")
    assert other.quantizer is not None
    other.quantizer.enable()
    components = made(short_config, three_digits, "aot_eager")
    images = components.batches.batch(0).images
    components.model(images)
    components.network.load_state_dict(other.network.state_dict())
    torch.testing.assert_close(components.model(images)[1], other.model(images)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_draws", [False, True])
def test_lsq_in_a_graph_has_the_same_values_and_gradients(with_draws: bool):
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(3, 40, generator=generator) for _ in range(2))
    draws = torch.rand(3, 40, generator=generator) if with_draws else None
    weight[0, :3] = torch.tensor([-0.04, 0.0, 9.0])
    results = []
    for function in (lsq_quantize, torch.compile(lsq_quantize, backend="eager", fullgraph=True)):
        latent = weight.clone().requires_grad_()
        scale = torch.tensor([[0.1], [0.2], [0.3]], requires_grad=True)
        value = function(latent, scale, -4, 3, draws)
        value.backward(grad)
        results.append((value, latent.grad, scale.grad))
    (value, of_weight, of_scale), (in_graph, weight_in_graph, scale_in_graph) = results
    assert torch.equal(in_graph, value)
    assert torch.equal(weight_in_graph, of_weight)
    torch.testing.assert_close(scale_in_graph, of_scale, rtol=1e-4, atol=1e-5)
