"""Fishr: its variances against gradients image by image, its averages, and when they move."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from qtdog.objectives.base import DomainOutputs
from qtdog.objectives.erm import erm_loss
from qtdog.objectives.fishr import gradient_variance, variance_penalty


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
