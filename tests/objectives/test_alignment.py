"""Penalties on features and gradients, each against its formula written out in NumPy, or image by image."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from qtdog.objectives import alignment
from qtdog.objectives.alignment import (
    coral_penalty,
    deep_coral_penalty,
    gradient_variance,
    mmd,
    mmd_penalty,
    variance_penalty,
)
from qtdog.objectives.base import DomainOutputs
from qtdog.objectives.functional import random_ring
from qtdog.objectives.risks import erm_loss, irm_penalty, scale_gradient, vrex_loss

CLOSE = {"rtol": 1e-9, "atol": 0}


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def cross_entropies(domains):
    picked = [log_softmax(d.logits.numpy())[np.arange(len(d.labels)), d.labels.numpy()] for d in domains]
    return np.array([-values.mean() for values in picked])


def vrex_by_hand(domains, weight):
    losses = cross_entropies(domains)
    mean = sum(losses) / len(losses)
    return mean + weight * sum((loss - mean) ** 2 for loss in losses) / len(losses)


def coral_by_hand(features):
    terms = []
    for x, y in combinations([f.numpy() for f in features], 2):
        means = np.mean((x.mean(0) - y.mean(0)) ** 2)
        terms.append(means + np.mean((np.cov(x.T, ddof=1) - np.cov(y.T, ddof=1)) ** 2))
    return np.mean(terms)


def deep_coral_by_hand(features):
    terms = []
    for x, y in combinations([f.numpy() for f in features], 2):
        # the covariances as the paper writes them: (DᵀD − (1ᵀD)ᵀ(1ᵀD)/n) / (n − 1)
        cx, cy = ((z.T @ z - np.outer(z.sum(0), z.sum(0)) / len(z)) / (len(z) - 1) for z in (x, y))
        terms.append(np.linalg.norm(cx - cy, "fro") ** 2 / (4 * x.shape[1] ** 2))
    return np.mean(terms)


def kernel(a, b):
    return sum(np.exp(-(10.0**k) * ((a - b) ** 2).sum()) for k in range(-3, 4))


def mmd_by_hand(features):
    def mean_kernel(x, y):
        return np.mean([kernel(a, b) for a in x for b in y])

    terms = []
    for x, y in combinations([f.numpy() for f in features], 2):
        terms.append(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    return np.mean(terms)


@pytest.mark.parametrize("seed", range(3))
def test_vrex_is_the_mean_plus_the_weighted_variance(outputs, seed):
    np.testing.assert_allclose(vrex_loss(outputs(seed), 7.0), vrex_by_hand(outputs(seed), 7.0), **CLOSE)


@pytest.mark.parametrize(
    ("penalty", "by_hand"),
    [
        (coral_penalty, coral_by_hand),
        (deep_coral_penalty, deep_coral_by_hand),
        (mmd_penalty, mmd_by_hand),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_distance_of_features_is_its_formula(outputs, penalty, by_hand, seed):
    features = [domain.features / 3 for domain in outputs(seed)]  # near enough for the kernels to differ
    np.testing.assert_allclose(penalty(features), by_hand(features), **CLOSE)


@pytest.mark.parametrize(
    ("penalty", "by_hand"),
    [(coral_penalty, coral_by_hand), (deep_coral_penalty, deep_coral_by_hand), (mmd_penalty, mmd_by_hand)],
)
@pytest.mark.parametrize("dim", [5, 40])
def test_many_domains_are_compared_at_once_with_the_value_and_gradient_of_pairs(penalty, by_hand, dim, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = [2 + i % 5 for i in range(25)]
    x = torch.cat([(1 + i / 10) * torch.randn(n, dim, generator=generator) for i, n in enumerate(sizes)])

    def value_and_gradient():
        leaf = x.clone().requires_grad_()
        value = penalty(leaf.split(sizes))
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    at_once, gradient = value_and_gradient()
    np.testing.assert_allclose(at_once, by_hand(x.split(sizes)), rtol=1e-5)
    monkeypatch.setattr(alignment, "MANY_DOMAINS", len(sizes))
    in_pairs, expected = value_and_gradient()
    np.testing.assert_allclose(at_once, in_pairs, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["coral", "deep-coral", "mmd"])
def test_an_aligned_loss_is_the_mean_over_domains_plus_the_weighted_distance(outputs, objective, name):
    domains = outputs(0)
    by_hand = {"coral": coral_by_hand, "deep-coral": deep_coral_by_hand, "mmd": mmd_by_hand}[name]
    expected = cross_entropies(domains).mean() + 0.3 * by_hand([domain.features for domain in domains])
    np.testing.assert_allclose(objective(name, weight=0.3).loss(domains), expected, **CLOSE)


@pytest.mark.parametrize("penalty", [coral_penalty, deep_coral_penalty, mmd_penalty])
def test_equal_domains_are_no_distance_apart_and_give_no_gradient(outputs, penalty):
    x = outputs(0)[0].features.requires_grad_()
    value = penalty([x, x, x])
    value.backward()
    assert value.item() == 0
    assert x.grad is not None
    assert x.grad.abs().max().item() < 1e-12


def test_mmd_has_the_gradient_of_its_formula(outputs):
    x, y = (domain.features[:3, :2] / 3 for domain in outputs(0)[:2])
    assert torch.autograd.gradcheck(mmd, (x.requires_grad_(), y.requires_grad_()))


def irm_by_double_backward(domains):
    """The penalty as its paper has it: a dummy scale of the logits, and gradients with respect to it."""
    products = []
    for domain in domains:
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        product = torch.ones((), dtype=torch.float64)
        for k in (0, 1):
            loss = torch.nn.functional.cross_entropy(domain.logits[k::2] * scale, domain.labels[k::2])
            (gradient,) = torch.autograd.grad(loss, scale, create_graph=True)
            product = product * gradient
        products.append(product)
    return torch.stack(products).mean()


@pytest.mark.parametrize("seed", range(3))
def test_irm_has_value_and_gradient_of_the_double_backward_pass(outputs, seed):
    domains = [DomainOutputs(d.features, d.logits.requires_grad_(), d.labels) for d in outputs(seed)]
    ours, theirs = irm_penalty(domains), irm_by_double_backward(domains)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    logits = [domain.logits for domain in domains]
    for one, other in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_the_product_of_halves_estimates_the_squared_gradient_without_bias():
    """Over all ways to draw two images, the mean product is the square of the gradient over all images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (8,), generator=generator)
    products = [
        irm_penalty([DomainOutputs(logits[[i, j]], logits[[i, j]], labels[[i, j]])]) for i in range(8) for j in range(8)
    ]
    torch.testing.assert_close(torch.stack(products).mean(), scale_gradient(logits, labels) ** 2)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_ring_joins_all_domains_in_random_order(n):
    rings = set()
    for seed in range(40):
        torch.manual_seed(seed)
        pairs = random_ring(n)
        rings.add(tuple(pairs))
        assert len(pairs) == n
        step = dict(pairs)
        seen = [0]
        while step[seen[-1]] != 0:
            seen.append(step[seen[-1]])
        assert sorted(seen) == list(range(n))
    assert len(rings) > 1


def variance_image_by_image(case, images, labels):
    """The variance of the gradients that autograd finds for each image alone, differentiable."""
    classifier = case.network.classifier
    rows = []
    for image, label in zip(images, labels, strict=True):
        loss = cross_entropy(case.network(image[None]), label[None])
        weight, bias = torch.autograd.grad(loss, [classifier.weight, classifier.bias], create_graph=True)
        rows.append(torch.cat([weight, bias[:, None]], 1))
    gradients = torch.stack(rows)
    return ((gradients - gradients.mean(0)) ** 2).mean(0)


def test_variances_are_those_of_the_gradients_of_single_images(case):
    for (images, labels), domain in zip(case.batch.split(), case.view.outputs(case.batch), strict=True):
        expected = variance_image_by_image(case, images, labels)
        torch.testing.assert_close(gradient_variance(domain), expected, rtol=1e-6, atol=1e-14)


def test_float32_variances_of_many_features_are_close_to_float64():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(32, 512, generator=generator)
    logits, labels = torch.randn(32, 7, generator=generator), torch.randint(7, (32,), generator=generator)
    exact = gradient_variance(DomainOutputs(features.double(), logits.double(), labels))
    torch.testing.assert_close(
        gradient_variance(DomainOutputs(features, logits, labels)).double(), exact, rtol=1e-4, atol=1e-7
    )


def test_the_gradient_of_the_loss_is_that_of_the_written_out_formula(case, objective):
    fishr = objective("fishr", weight=50.0, anneal_steps=0, ema=0.9)
    parameters = list(case.network.parameters())
    found = torch.autograd.grad(fishr(case.view, case.batch), parameters)
    variances = torch.stack([variance_image_by_image(case, *domain) for domain in case.batch.split()])
    distances = ((variances - variances.mean(0)) ** 2).flatten(1).mean(1)
    expected = torch.autograd.grad(erm_loss(case.view.outputs(case.batch)) + 50.0 * distances.mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


def test_averages_and_penalty_follow_the_formula_over_steps(case, objective):
    ema = 0.8
    fishr = objective("fishr", weight=50.0, anneal_steps=0, ema=ema)
    average = np.zeros((3, 4, 6))
    for step in range(3):
        outputs = case.view.outputs(case.at(step))
        present = torch.stack([gradient_variance(domain) for domain in outputs]).detach().numpy()
        average = ema * average + (1 - ema) * present
        scaled = average / (1 - ema)
        penalty = np.mean([np.mean((one - scaled.mean(0)) ** 2) for one in scaled])
        found = fishr(case.view, case.at(step)).item()
        np.testing.assert_allclose(found, erm_loss(outputs).item() + 50.0 * penalty, rtol=1e-6)
        np.testing.assert_allclose(fishr.average.numpy(), average, rtol=1e-6)
        with torch.no_grad():
            case.network.classifier.weight.add_(0.1)


def test_a_second_pass_over_a_step_starts_from_the_step_before(case, objective):
    fishr = objective("fishr", anneal_steps=0)
    fishr(case.view, case.at(0))
    first = fishr(case.view, case.at(1))
    average = fishr.average.clone()
    assert torch.equal(fishr(case.view, case.at(1)), first)
    assert torch.equal(fishr.average, average)


def test_it_goes_on_from_its_state(case, objective):
    whole, first = (objective("fishr", anneal_steps=1) for _ in range(2))
    losses = [whole(case.view, case.at(step)) for step in range(4)]
    for step in range(2):
        first(case.view, case.at(step))
    second = objective("fishr", anneal_steps=1)
    second.load_state_dict(first.state_dict())
    assert [second(case.view, case.at(step)) for step in (2, 3)] == losses[2:]


def test_a_loss_that_is_not_finite_leaves_the_averages(case, objective):
    fishr = objective("fishr", anneal_steps=0)
    fishr(case.view, case.at(0))
    before = fishr.average.clone()
    case.batch.images.fill_(float("nan"))
    assert fishr(case.view, case.at(1)).isnan()
    assert torch.equal(fishr.average, before)


def test_equal_variances_cost_nothing():
    assert variance_penalty(torch.ones(3, 4, 5)).item() == 0
