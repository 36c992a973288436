"""GroupDRO: its shares against the algorithm, and when they move."""

from __future__ import annotations

import numpy as np
import torch

from qtdog.objectives.functional import domain_losses


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
