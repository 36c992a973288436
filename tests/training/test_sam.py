"""SAM against its formula, with and without quantizers, and that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from qtdog.conversion.attach import attach, sites
from qtdog.core.errors import NonFiniteLossError
from qtdog.data.known_datasets import RotatedDigits
from qtdog.objectives.risks import ERM
from qtdog.quantizers.lsq import LSQ
from qtdog.training.build import build_components
from qtdog.training.loop import update
from qtdog.training.protocol import resolve
from qtdog.training.step_rules import SAGM, SAM, Plain, StepRule, Update

RHO = 0.3
SPACES = ("latent", "dequantized")
Changes = dict[str, Tensor]


def small_network(*, bits: int | None = None, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    if bits is not None:
        attach(network, bits=bits, exclude=["2"]).enable()
    return network


def only_quantizer(network: nn.Module) -> tuple[LSQ, nn.Parameter]:
    (site,) = sites(network)
    assert isinstance(site.quantizer, LSQ)
    return site.quantizer, site.weight


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 6, dtype=dtype), torch.arange(16) % 3


def loss_of(network: nn.Module, values: Mapping[str, Tensor] | None = None) -> Tensor:
    images, labels = batch(next(network.parameters()).dtype)
    logits = network(images) if values is None else functional_call(network, dict(values), (images,))
    return nn.functional.cross_entropy(logits, labels)


def step(rule: StepRule, network: nn.Module, on_pass: Callable[[int], None] = lambda number: None) -> Tensor:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    passes: list[int] = []

    def backward() -> Tensor:
        passes.append(len(passes))
        on_pass(passes[-1])
        loss = loss_of(network)
        loss.backward()
        return loss.detach()

    loss = rule(Update(backward, optimizer, network))
    assert len(passes) == rule.N_PASSES
    return loss


def formula(network: nn.Module, factor_of: Callable[[Tensor], Tensor]) -> tuple[Changes, Changes]:
    """The gradients at w and at w + factor(‖g‖) · g, by functional calls."""
    values = {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
    first = torch.autograd.grad(loss_of(network, values), list(values.values()))
    norm = torch.cat([gradient.flatten() for gradient in first]).norm()
    moved = {name: value + factor_of(norm) * g for (name, value), g in zip(values.items(), first, strict=True)}
    leaves = {name: value.detach().requires_grad_() for name, value in moved.items()}
    second = torch.autograd.grad(loss_of(network, leaves), list(leaves.values()))
    return dict(zip(values, first, strict=True)), dict(zip(values, second, strict=True))


@pytest.mark.parametrize("space", SPACES)
def test_the_update_is_that_of_the_paper(space):
    network = small_network()
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    _, gradients = formula(network, lambda norm: RHO / norm)
    expected_loss = loss_of(network).detach()
    assert torch.equal(step(SAM({"rho": RHO, "space": space}), network), expected_loss)
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] - 0.1 * gradients[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_sagm_sums_the_gradients_of_both_losses(space):
    network = small_network()
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    clean, shifted = formula(network, lambda norm: RHO / norm - 0.2)
    step(SAGM({"rho": RHO, "alpha": 0.2, "space": space}), network)
    for name, value in network.named_parameters():
        expected = before[name] - 0.1 * (clean[name] + shifted[name])
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("space", SPACES)
def test_without_a_perturbation_sam_is_the_plain_step(space, bits):
    ours, plain = small_network(bits=bits), small_network(bits=bits)
    step(SAM({"rho": 0, "space": space}), ours)
    step(Plain({}), plain)
    for (name, value), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, other), name


def weights_in_use(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{place}.{name}": getattr(layer, name).detach().clone()
        for place, layer in network.named_children()
        if isinstance(layer, nn.Linear)
        for name in ("weight", "bias")
    }


def in_both_passes(rule: StepRule, network: nn.Module) -> list[dict[str, Tensor]]:
    seen = []
    step(rule, network, lambda number: seen.append(weights_in_use(network)))
    return seen


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return torch.cat([(other[name] - one[name]).flatten() for name in one]).norm().item()


@pytest.mark.parametrize("bits", [None, 7, 2])
def test_dequantized_weights_move_by_exactly_rho_whatever_the_bits(bits):
    seen = in_both_passes(SAM({"rho": RHO}), small_network(bits=bits))
    assert distance(*seen) == pytest.approx(RHO)


def test_latent_moves_show_only_as_whole_steps():
    network = small_network(bits=3)
    scale = only_quantizer(network)[0].step_sizes().detach()
    seen = in_both_passes(SAM({"rho": 0.05, "space": "latent"}), network)
    n_steps = (seen[1]["0.weight"] - seen[0]["0.weight"]) / scale[:, None]
    torch.testing.assert_close(n_steps, n_steps.round(), rtol=0, atol=1e-5)
    assert (n_steps == 0).float().mean() > 0.8  # most moves vanish
    assert not torch.equal(seen[0]["2.weight"], seen[1]["2.weight"])  # what is not quantized moves


def test_the_gradient_reaches_the_latent_weight_straight_through():
    network = small_network(bits=7)
    quantizer, latent = only_quantizer(network)
    clipped = quantizer.quantized(latent).codes.abs() >= 63
    before = latent.detach().clone()
    seen = in_both_passes(SAM({"rho": RHO}), network)

    plain = small_network()
    values = {name: seen[1][name].requires_grad_() for name, _ in plain.named_parameters()}
    gradients = torch.autograd.grad(loss_of(plain, values), list(values.values()))
    expected = before - 0.1 * dict(zip(values, gradients, strict=True))["0.weight"]
    torch.testing.assert_close(latent.detach()[~clipped], expected[~clipped], rtol=0, atol=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rule", [SAM, SAGM])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_pass_that_fails_leaves_every_parameter_as_it_was(rule, space, bits):
    network = small_network(bits=bits, dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in network.state_dict().items()}
    moved = []

    def fail(number: int) -> None:
        moved.append(weights_in_use(network))
        if number == 1:
            raise NonFiniteLossError("nan")

    with pytest.raises(NonFiniteLossError):
        step(rule({"rho": 10.0, "space": space}), network, fail)
    assert distance(*moved) > 0  # it had been moved
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert weights_in_use(network).keys() == moved[0].keys()
    assert distance(weights_in_use(network), moved[0]) == 0  # no hook is left behind


@pytest.mark.parametrize("rule", [SAM, SAGM])
def test_step_sizes_train_but_are_not_perturbed(rule):
    network = small_network(bits=4)
    log_scale = only_quantizer(network)[0].log_scale
    before = log_scale.detach().clone()
    seen: list[Tensor] = []
    step(rule({"rho": 10.0, "space": "latent"}), network, lambda number: seen.append(log_scale.detach().clone()))
    assert torch.equal(seen[0], before)
    assert torch.equal(seen[1], before)
    assert not torch.equal(log_scale, before)


def test_a_gradient_of_zero_moves_nothing():
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def backward() -> Tensor:
        loss = 0.0 * loss_of(network)
        loss.backward()
        return loss.detach()

    before = [value.detach().clone() for value in network.parameters()]
    SAM({})(Update(backward, optimizer, network))
    assert all(torch.equal(value, old) for value, old in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("rule", [SAM, SAGM])
def test_running_statistics_come_from_the_clean_pass_alone(rule):
    networks = []
    for made in (Plain({}), rule({"rho": 1.0})):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
        step(made, network)
        networks.append(network)
    for one, other in zip(*(network.buffers() for network in networks), strict=True):
        assert torch.equal(one, other)


def test_both_passes_of_an_update_draw_the_same_noise(short_config, monkeypatch):
    digits = RotatedDigits()
    config = resolve(short_config(step_rule={"name": "sam"}), digits)
    drawn: list[float] = []
    real = ERM.loss

    def noisy(self, domains):
        drawn.append(torch.rand(()).item())
        return real(self, domains)

    monkeypatch.setattr(ERM, "loss", noisy)
    parts = build_components(config, digits)
    update(parts, parts.batches.batch(0), 0)
    update(parts, parts.batches.batch(1), 1)
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]
