"""Mixup: the law of its shares, what is mixed with what, and its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from qtdog.core.errors import ConfigError
from qtdog.data.digits import RotatedDigits
from qtdog.objectives.functional import random_ring
from qtdog.objectives.mixup import draw_shares, mixed_loss
from qtdog.training.build import build_components
from qtdog.training.protocol import resolve


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 10.0])
def test_shares_follow_the_beta_law(alpha):
    torch.manual_seed(0)
    n = 20_000
    shares = np.array(draw_shares(alpha, n))
    assert shares.min() >= 0
    assert shares.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(α, α)
    assert abs(shares.mean() - 0.5) < 4 * np.sqrt(variance / n)
    assert shares.var() == pytest.approx(variance, rel=0.05)
    drawn = np.random.default_rng(0).beta(alpha, alpha, n)  # the whole distribution, by Kolmogorov and Smirnov
    points = np.concatenate([shares, drawn])
    distance = np.abs([(shares <= p).mean() - (drawn <= p).mean() for p in points[:: n // 100]]).max()
    assert distance < 1.63 * np.sqrt(2 / n)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_the_cross_entropy_with_the_mixed_label(share):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    one, other = torch.randint(4, (2, 6), generator=generator)
    target = share * one_hot(one, 4).double() + (1 - share) * one_hot(other, 4).double()
    torch.testing.assert_close(mixed_loss(logits, (one, other), share), cross_entropy(logits, target))


def test_each_domain_is_mixed_with_its_neighbor_image_by_image(case, objective):
    torch.manual_seed(5)
    found = objective("mixup", alpha=0.7)(case.view, case.batch)
    torch.manual_seed(5)
    pairs, shares = random_ring(3), draw_shares(0.7, 3)
    domains = list(case.batch.split())
    terms = []
    for (i, j), share in zip(pairs, shares, strict=True):
        logits = case.network(share * domains[i][0] + (1 - share) * domains[j][0])
        log_probability = logits.log_softmax(1).detach().numpy()
        for labels, part in ((domains[i][1], share), (domains[j][1], 1 - share)):
            terms.append(-part * log_probability[np.arange(len(labels)), labels.numpy()].mean())
    np.testing.assert_allclose(found.item(), sum(terms) / 3, rtol=1e-9)


def test_draws_depend_on_the_seed_alone(case, objective):
    mixup = objective("mixup")

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return mixup(case.view, case.batch).item()

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(5)}) == 5


def test_domains_of_unequal_shares_are_refused_before_anything_starts(short_config):
    digits = RotatedDigits()
    data = {"target": "75", "batch_size": 8, "image_size": 12, "focus": "15"}
    config = resolve(short_config(objective={"name": "mixup"}, data=data), digits)
    with pytest.raises(ConfigError, match=r"'mixup' takes as many images of every domain.*Leave data\.focus out"):
        build_components(config, digits)
