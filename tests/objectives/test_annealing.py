"""Penalties that set in, or change their weight, at a step."""

from __future__ import annotations

import pytest
import torch

from qtdog.objectives.erm import erm_loss
from qtdog.objectives.functional import domain_losses
from qtdog.objectives.irm import irm_penalty
from qtdog.objectives.vrex import vrex_loss


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
