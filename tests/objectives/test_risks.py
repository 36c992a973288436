"""Losses of risks: ERM, GroupDRO, and penalties that set in, or change their weight, at a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtdog.objectives.base import DomainOutputs
from qtdog.objectives.functional import domain_losses
from qtdog.objectives.risks import erm_loss, irm_penalty, vrex_loss


def in_float64(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_probability[np.arange(len(labels)), labels].mean())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(2, 7), st.integers(0, 1000))
def test_erm_is_the_mean_over_all_images(sizes, n_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    domains = []
    for n in sizes:
        logits = 3 * torch.randn(n, n_classes, generator=generator)
        labels = torch.randint(0, n_classes, (n,), generator=generator)
        domains.append(DomainOutputs(torch.zeros(n, 1), logits, labels))
    expected = in_float64(
        torch.cat([domain.logits for domain in domains]).double().numpy(),
        torch.cat([domain.labels for domain in domains]).numpy(),
    )
    assert abs(erm_loss(domains).item() - expected) < 1e-5 * max(1, expected)


def test_gradient_is_softmax_minus_one_hot():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([1, 2])
    erm_loss([DomainOutputs(logits, logits, labels)]).backward()
    expected = (logits.detach().softmax(1) - torch.eye(3)[labels]) / 2
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (9, 1.0), (10, 30.0), (11, 30.0)])
def test_irm_weighs_the_penalty_by_one_and_then_by_its_weight(case, objective, step, weight):
    domains = case.view.outputs(case.batch)
    found = objective("irm", weight=30.0, anneal_steps=10)(case.view, case.at(step))
    torch.testing.assert_close(found, domain_losses(domains).mean() + weight * irm_penalty(domains))


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (9, 1.0), (10, 30.0), (11, 30.0)])
def test_vrex_weighs_the_variance_by_one_and_then_by_its_weight(case, objective, step, weight):
    found = objective("vrex", weight=30.0, anneal_steps=10)(case.view, case.at(step))
    torch.testing.assert_close(found, vrex_loss(case.view.outputs(case.batch), weight))


def test_fishr_is_erm_until_its_penalty_sets_in(case, objective):
    erm = erm_loss(case.view.outputs(case.batch))
    fishr = objective("fishr", anneal_steps=2)
    losses = [fishr(case.view, case.at(step)) for step in range(3)]
    assert torch.equal(losses[0], erm)
    assert torch.equal(losses[1], erm)
    assert losses[2] > erm


def test_shares_and_loss_follow_the_algorithm(case, objective):
    groupdro = objective("groupdro", eta=0.5)
    losses = domain_losses(case.view.outputs(case.batch)).detach().numpy()
    shares = np.ones(3) / 3
    for step in range(4):
        shares = shares * np.exp(0.5 * losses)
        shares /= shares.sum()
        found = groupdro(case.view, case.at(step))
        np.testing.assert_allclose(found.item(), shares @ losses, rtol=1e-9)
        np.testing.assert_allclose(groupdro.shares.numpy(), shares, rtol=1e-9)


def test_the_shares_are_constants_to_the_gradient(case, objective):
    groupdro = objective("groupdro", eta=0.5)
    parameters = list(case.network.parameters())
    found = torch.autograd.grad(groupdro(case.view, case.batch), parameters)
    losses = domain_losses(case.view.outputs(case.batch))
    expected = torch.autograd.grad(losses @ groupdro.shares, parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_pass_over_a_step_moves_nothing(case, objective):
    groupdro = objective("groupdro", eta=0.5)
    first = groupdro(case.view, case.batch)
    shares = groupdro.shares.clone()
    assert torch.equal(groupdro(case.view, case.batch), first)
    assert torch.equal(groupdro.shares, shares)
    groupdro(case.view, case.at(1))
    assert not torch.equal(groupdro.shares, shares)


def test_it_goes_on_from_its_state(case, objective):
    whole, first = objective("groupdro"), objective("groupdro")
    losses = [whole(case.view, case.at(step)) for step in range(4)]
    for step in range(2):
        first(case.view, case.at(step))
    second = objective("groupdro")
    second.load_state_dict(first.state_dict())
    assert [second(case.view, case.at(step)) for step in (2, 3)] == losses[2:]
    assert torch.equal(second.shares, whole.shares)


def test_a_loss_that_is_not_finite_leaves_the_shares(case, objective):
    groupdro = objective("groupdro")
    before = groupdro.shares.clone()
    case.batch.images.fill_(float("nan"))
    assert groupdro(case.view, case.batch).isnan()
    assert torch.equal(groupdro.shares, before)
