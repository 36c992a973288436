"""MLDG and Fish against loops over explicit copies of the network, plain and quantized; ARM's context."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qtdog.conversion.attach import attach
from qtdog.core.errors import ConfigError
from qtdog.data.known_datasets import RotatedDigits
from qtdog.models.backbones import create_network
from qtdog.objectives.base import DomainBatch, ModelView, ObjectiveSetting
from qtdog.objectives.functional import random_ring, with_gradients
from qtdog.objectives.meta_learning import ARM
from qtdog.training.build import build_components
from qtdog.training.components import Trainable
from qtdog.training.protocol import resolve

SEED = 3


@pytest.fixture(params=["float", "attached", "log", "raw"])
def prepared(request, case):
    """The case as it is, with quantizers that wait, and with enabled ones of both kinds of step size."""
    if request.param != "float":
        mode = "raw" if request.param == "raw" else "log"
        quantizers = attach(case.network, bits=4, exclude=["classifier"], step_mode=mode)
        if request.param != "attached":
            quantizers.enable()
    return case


def copy_after_step(network: nn.Module, domain: tuple[Tensor, Tensor], lr: float) -> tuple[nn.Module, float]:
    """A copy of the network after one step of torch's SGD, and the loss before it."""
    moved = copy.deepcopy(network)
    optimizer = torch.optim.SGD(moved.parameters(), lr=lr)
    optimizer.zero_grad()
    loss = cross_entropy(moved(domain[0]), domain[1])
    loss.backward()
    optimizer.step()
    return moved, loss.item()


def gradients_of(network: nn.Module, domain: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor | None], float]:
    clone = copy.deepcopy(network)
    clone.zero_grad()
    loss = cross_entropy(clone(domain[0]), domain[1])
    loss.backward()
    return {name: p.grad for name, p in clone.named_parameters()}, loss.item()


def assert_same_gradients(network: nn.Module, expected: dict[str, Tensor | None]) -> None:
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-12, msg=name)


def mldg_by_hand(network, domains, beta, lr):
    value, total = 0.0, {}
    pairs = random_ring(len(domains))
    for i, j in pairs:
        before, loss = gradients_of(network, domains[i])
        moved, _ = copy_after_step(network, domains[i], lr)
        after, loss_after = gradients_of(moved, domains[j])
        value += (loss + beta * loss_after) / len(pairs)
        for name in before:
            one, other = before[name], after[name]
            if one is not None and other is not None:
                total[name] = total.get(name, 0) + (one + beta * other) / len(pairs)
            else:
                total[name] = None
    return value, total


@pytest.mark.parametrize(("beta", "lr"), [(1.0, 0.1), (0.3, 0.5)])
def test_mldg_is_the_loop_over_copies(prepared, objective, beta, lr):
    torch.manual_seed(SEED)
    value, expected = mldg_by_hand(prepared.network, list(prepared.batch.split()), beta, lr)
    torch.manual_seed(SEED)
    loss = objective("mldg", beta=beta, inner_lr=lr)(prepared.view, prepared.batch)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert_same_gradients(prepared.network, expected)


def fish_by_hand(network, domains, lr):
    """The parameters after the inner steps, and the mean loss on the way."""
    losses = []
    for index in torch.randperm(len(domains)).tolist():
        network, loss = copy_after_step(network, domains[index], lr)
        losses.append(loss)
    return dict(network.named_parameters()), sum(losses) / len(losses)


@pytest.mark.parametrize("n_domains", [2, 3])
def test_fish_with_sgd_is_the_algorithm_of_the_paper(prepared, objective, n_domains):
    meta_lr, lr = 0.5, 0.2
    n = sum(prepared.batch.sizes[:n_domains])
    batch = type(prepared.batch)(prepared.batch.images[:n], prepared.batch.labels[:n], prepared.batch.sizes[:n_domains])
    start = {name: p.detach().clone() for name, p in prepared.network.named_parameters()}
    torch.manual_seed(SEED)
    inner, value = fish_by_hand(prepared.network, list(batch.split()), lr)

    optimizer = torch.optim.SGD(prepared.network.parameters(), lr=lr)
    torch.manual_seed(SEED)
    loss = objective("fish", meta_lr=meta_lr, inner_lr=lr)(prepared.view, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    for name, parameter in prepared.network.named_parameters():
        expected = start[name] + meta_lr * (inner[name].detach() - start[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", ["mldg", "fish"])
def test_the_network_itself_stays_until_the_optimizer_moves_it(prepared, objective, name):
    before = {key: value.clone() for key, value in prepared.network.state_dict().items()}
    objective(name, inner_lr=0.5)(prepared.view, prepared.batch).backward()
    assert all(torch.equal(value, before[key]) for key, value in prepared.network.state_dict().items())


@pytest.mark.parametrize("name", ["mldg", "fish"])
def test_without_an_inner_step_the_gradient_is_a_multiple_of_the_mean_loss_gradient(case, objective, name):
    params, factor = {"mldg": ({"beta": 0.5}, 1.5), "fish": ({"meta_lr": 0.5}, 0.5 * 3)}[name]
    objective(name, inner_lr=0.0, **params)(case.view, case.batch).backward()
    losses = [cross_entropy(case.network(images), labels) for images, labels in case.batch.split()]
    parameters = list(case.network.parameters())
    expected = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, factor * gradient)


def test_given_gradients_reach_only_their_parameters():
    parameters: dict[str, Tensor] = {name: torch.ones(2, requires_grad=True) for name in "ab"}
    loss = with_gradients(torch.tensor(5.0), parameters, {"a": torch.tensor([1.0, 3.0])})
    (2 * loss).backward()
    assert loss.item() == 5.0
    assert parameters["a"].grad is not None
    assert parameters["a"].grad.tolist() == [2.0, 6.0]
    assert parameters["b"].grad is None


SIZES = (4, 6, 2)


@pytest.fixture
def network():
    options = {"n_classes": 3, "channels": 1, "image_size": 8, "weights": "none", "freeze_bn": True, "seed": 0}
    # evaluation mode, so that batch norm does not join what the contexts keep apart
    return create_network("digits_cnn", feature_layer="context", feature_params={"width": 4}, **options).double().eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(sum(SIZES), 1, 8, 8, dtype=torch.float64, generator=generator)
    return DomainBatch(images, torch.randint(3, (sum(SIZES),), generator=generator), SIZES)


def loss(network, batch):
    return ARM(ObjectiveSetting(3, 3, 32, 4, network), {})(ModelView(Trainable(network), network), batch)


def test_the_loss_is_that_of_every_domain_with_its_own_context(network, batch):
    logits = torch.cat([network(images) for images, _ in batch.split()])
    torch.testing.assert_close(loss(network, batch), cross_entropy(logits, batch.labels))
    assert not torch.isclose(loss(network, batch), cross_entropy(network(batch.images), batch.labels))


def test_the_gradient_reaches_the_context_network(network, batch):
    loss(network, batch).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
    assert network.context.layers[0].weight.grad.abs().sum() > 0


def test_without_a_context_it_is_refused():
    plain = create_network("digits_cnn", n_classes=3, channels=1, image_size=8, weights="none", freeze_bn=True, seed=0)
    with pytest.raises(ConfigError, match=r"this network has none: add --set model\.feature_layer=context"):
        ARM(ObjectiveSetting(3, 3, 32, 4, plain), {})


@pytest.mark.parametrize(
    ("objective", "layer", "message"),
    [
        ("arm", "none", r"add --set model\.feature_layer=context"),
        ("arm", "mixstyle", r"add --set model\.feature_layer=context"),
        ("erm", "context", "'context' makes no sense with objective 'erm': it is for arm. Add --objective arm"),
        ("erm", "mixstile", "unknown feature layer 'mixstile'; did you mean 'mixstyle'"),
    ],
)
def test_names_that_do_not_go_together_are_refused(short_config, objective, layer, message):
    digits = RotatedDigits()
    config = resolve(short_config(objective={"name": objective}, model={"feature_layer": layer}), digits)
    with pytest.raises(ConfigError, match=message):
        build_components(config, digits)
