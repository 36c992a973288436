"""What Mixup, RSC, SagNet and CCFP change, and their losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from qtdog.core.errors import ConfigError
from qtdog.core.feature_maps import Stage
from qtdog.data.known_datasets import RotatedDigits
from qtdog.objectives.base import ObjectiveSetting
from qtdog.objectives.functional import random_ring
from qtdog.objectives.perturbation import (
    CCFP,
    SagNet,
    StyleShifts,
    consistency,
    content_randomized,
    domain_discrepancy,
    draw_shares,
    gram,
    mixed_loss,
    reaching_only,
    style_randomized,
    uniformity_loss,
)
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


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def rsc_by_hand(case, feature_frac, image_frac):
    """DomainBed's recipe on a linear classifier, whose logit of class y has the gradient W[y]."""
    weight, bias = (p.detach().numpy() for p in case.network.classifier.parameters())
    features = case.network.features(case.batch.images).detach().numpy()
    labels = case.batch.labels.numpy()
    rows = np.arange(len(labels))
    gradient = weight[labels]
    limits = np.percentile(gradient, 100 * (1 - feature_frac), axis=1)
    kept = gradient < limits[:, None]
    before = softmax(features @ weight.T + bias)[rows, labels]
    after = softmax((features * kept) @ weight.T + bias)[rows, labels]
    spared = before - after < np.percentile(before - after, 100 * (1 - image_frac))
    mask = kept | spared[:, None]
    return mask, -np.log(softmax((features * mask) @ weight.T + bias)[rows, labels]).mean()


@pytest.mark.parametrize(("feature_frac", "image_frac"), [(1 / 3, 1 / 3), (0.5, 0.2), (0.1, 0.5), (0.0, 0.0), (1, 1)])
def test_the_loss_is_that_of_the_recipe(case, objective, feature_frac, image_frac):
    mask, expected = rsc_by_hand(case, feature_frac, image_frac)
    found = objective("rsc", feature_frac=feature_frac, image_frac=image_frac)(case.view, case.batch)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-9)
    assert not mask.all()


def test_muted_features_get_no_gradient_and_the_mask_adds_none(case, objective):
    mask, _ = rsc_by_hand(case, 1 / 3, 1 / 3)
    seen = []
    handle = case.network.featurizer.register_forward_hook(lambda module, inputs, output: output.retain_grad())
    hook = case.network.featurizer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    objective("rsc")(case.view, case.batch).backward()
    handle.remove()
    hook.remove()
    (features,) = seen
    np.testing.assert_array_equal(features.grad.numpy() != 0, mask)


def test_it_works_with_one_domain_and_one_image(case, objective):
    one = type(case.batch)(case.batch.images[:1], case.batch.labels[:1], (1,))
    assert torch.isfinite(objective("rsc")(case.view, one))


EPS = 1e-6
CASES = [((5, 7), [1]), ((5, 3, 4, 2), [2, 3]), ((5, 4, 3), [1])]
PARTNER = torch.tensor([3, 0, 1, 4, 2])


def draw(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1


def moments(array: np.ndarray, dims: list[int]) -> tuple[np.ndarray, np.ndarray]:
    axes = tuple(dims)
    return array.mean(axes, keepdims=True), array.var(axes, keepdims=True) + EPS


@pytest.mark.parametrize(("shape", "dims"), CASES)
def test_a_random_style_mixes_mean_and_variance(shape, dims):
    features, share = draw(shape), torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    found = style_randomized(features, dims, share, PARTNER).numpy()
    x, p = features.numpy(), PARTNER.numpy()
    a = share.numpy().reshape(-1, *[1] * (len(shape) - 1))
    mean, var = moments(x, dims)
    new_mean, new_var = a * mean + (1 - a) * mean[p], a * var + (1 - a) * var[p]
    np.testing.assert_allclose(found, (x - mean) / np.sqrt(var) * np.sqrt(new_var) + new_mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found[4], x[4])  # share 1: its own style


@pytest.mark.parametrize(("shape", "dims"), CASES)
def test_a_random_content_is_that_of_the_partner_without_a_gradient(shape, dims):
    features = draw(shape).requires_grad_()
    found = content_randomized(features, dims, PARTNER)
    mean, var = moments(features.detach().numpy(), dims)
    content = ((features.detach().numpy() - mean) / np.sqrt(var))[PARTNER.numpy()]
    np.testing.assert_allclose(found.detach().numpy(), content * np.sqrt(var) + mean, rtol=1e-10, atol=1e-10)

    weights = draw(shape).flip(0)
    (grad,) = torch.autograd.grad((found * weights).sum(), features)
    twin = features.detach().requires_grad_()
    twin_mean = twin.mean(dims, keepdim=True)
    twin_std = (((twin - twin_mean) ** 2).mean(dims, keepdim=True) + EPS).sqrt()
    (expected,) = torch.autograd.grad(((torch.from_numpy(content) * twin_std + twin_mean) * weights).sum(), twin)
    torch.testing.assert_close(grad, expected)


def test_uniformity_is_least_where_all_classes_are_alike():
    logits = draw((6, 4))
    shifted = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    assert uniformity_loss(logits).item() == pytest.approx(-np.log(shifted).mean(), rel=1e-12)
    assert uniformity_loss(torch.ones(2, 4)).item() == pytest.approx(math.log(4))
    assert uniformity_loss(logits) > math.log(4)


def terms(staged, objective: SagNet, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Content, style and adversarial term of the vector level, every gradient left on."""
    torch.manual_seed(seed)
    n = len(staged.batch.labels)
    share, partner, content = torch.rand(n), torch.randperm(n), torch.randperm(n)
    features = staged.network.features(staged.batch.images)
    styled = style_randomized(features, [1], share, partner)
    styles = content_randomized(features, [1], content)
    labels = staged.batch.labels
    style_logits = objective.style_head(styles)
    return (
        cross_entropy(staged.network.classifier(styled), labels),
        cross_entropy(style_logits, labels),
        uniformity_loss(style_logits),
    )


def test_the_loss_has_its_three_terms(staged):
    objective = staged.objective("sagnet", weight=0.7)
    content, style, adversarial = terms(staged, objective)
    torch.testing.assert_close(staged.loss(objective), content + style + 0.7 * adversarial)


def test_every_term_trains_exactly_what_it_should(staged):
    objective = staged.objective("sagnet", weight=0.7)
    content, style, adversarial = terms(staged, objective)
    ours = list(staged.network.parameters())
    head = list(objective.style_head.parameters())
    expected = torch.autograd.grad(content + 0.7 * adversarial, ours, retain_graph=True)
    expected_head = torch.autograd.grad(style, head)  # not from the adversarial term
    found = torch.autograd.grad(staged.loss(objective), ours + head)
    for one, other in zip(found, (*expected, *expected_head), strict=True):
        torch.testing.assert_close(one, other)
    classifier = torch.autograd.grad(terms(staged, objective)[0], list(staged.network.classifier.parameters()))
    torch.testing.assert_close(found[len(ours) - 2 : len(ours)], classifier)  # nor does it reach the classifier
    gentle = torch.autograd.grad(staged.loss(staged.objective("sagnet", weight=0.0)), ours)
    assert not torch.allclose(gentle[0], found[0])


def test_a_map_has_its_style_per_channel_behind_the_third_stage(staged):
    objective = staged.objective("sagnet", level="map", weight=0.7)
    assert objective.stage == Stage("featurizer.8", 32, axis=1, ndim=4)
    layers = list(staged.network.featurizer.children())
    features = staged.batch.images
    for layer in layers[:9]:
        features = layer(features)
    torch.manual_seed(0)
    n = len(staged.batch.labels)
    share, partner = torch.rand(n), torch.randperm(n)
    deeper = style_randomized(features, [2, 3], share, partner)
    for layer in layers[9:]:
        deeper = layer(deeper)
    content = cross_entropy(staged.network.classifier(deeper), staged.batch.labels)
    mean = features.mean((2, 3))
    std = (((features - mean[:, :, None, None]) ** 2).mean((2, 3)) + EPS).sqrt()
    style_logits = objective.style_head(torch.cat([mean, std], 1))
    style, adversarial = cross_entropy(style_logits, staged.batch.labels), uniformity_loss(style_logits)
    loss = staged.loss(objective)
    torch.testing.assert_close(loss, content + style + 0.7 * adversarial)
    early, late = layers[0].weight, layers[9].weight
    expected = torch.autograd.grad(content + 0.7 * adversarial, [early, late], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [early, late]), expected)


def test_the_style_head_starts_by_the_seed_and_the_global_state_is_left_alone(staged):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    heads = [staged.objective("sagnet").style_head.weight for _ in range(2)]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(*heads)
    other = SagNet(ObjectiveSetting(3, 4, 32, 6, staged.network, seed=4), {}).style_head.weight
    assert not torch.equal(other.double(), heads[0])


def test_what_it_cannot_do_is_refused(staged):
    with pytest.raises(ConfigError, match="unknown level of objective 'sagnet' 'maps'; did you mean 'map'"):
        staged.objective("sagnet", level="maps")
    three = ObjectiveSetting(3, 4, 32, 6, staged.network, stages=lambda: staged.setting.stages()[:3])
    with pytest.raises(ConfigError, match="behind stage 3 of at least 4, this backbone has 3"):
        SagNet(three, {"level": "map"})


STAGES = [Stage("a", 3, axis=1, ndim=4), Stage("b", 5, axis=3, ndim=4), Stage("c", 4, axis=2, ndim=3)]
SHAPES = [(6, 3, 4, 4), (6, 2, 3, 5), (6, 7, 4)]


def draw_of_ccfp(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gram_in_numpy(features: torch.Tensor, stage: Stage) -> np.ndarray:
    grams = []
    for image in np.moveaxis(features.numpy(), stage.axis, 1):
        flat = image.reshape(stage.n_channels, -1)
        grams.append(flat @ flat.T / flat.size)
    return np.stack(grams)


@pytest.mark.parametrize("index", range(3))
def test_the_gram_matrix_of_every_layout(index: int):
    features = draw_of_ccfp(0)[index]
    np.testing.assert_allclose(gram(features, STAGES[index]).numpy(), gram_in_numpy(features, STAGES[index]))


def test_the_discrepancy_is_the_norm_between_gram_matrices():
    ours, theirs = draw_of_ccfp(0), draw_of_ccfp(1)
    expected = sum(
        np.sqrt(((gram_in_numpy(f, stage) - gram_in_numpy(g, stage)) ** 2).sum())
        for f, g, stage in zip(ours, theirs, STAGES, strict=True)
    )
    assert domain_discrepancy(ours, theirs, STAGES).item() == pytest.approx(expected, rel=1e-12)


def test_each_stream_is_drawn_to_the_other():
    one, other = (features.requires_grad_() for features in (draw_of_ccfp(0)[2], draw_of_ccfp(1)[2]))
    loss = consistency(one, other)
    assert loss.item() == pytest.approx(2 * ((one - other) ** 2).mean().item(), rel=1e-12)
    grads = torch.autograd.grad(loss, [one, other])
    torch.testing.assert_close(grads[0], 2 * (one - other).detach() / one.numel())
    torch.testing.assert_close(grads[1], -grads[0])


@pytest.mark.parametrize("index", range(3))
def test_a_shift_moves_mean_and_deviation_of_its_channel(index: int):
    stage, features = STAGES[index], draw_of_ccfp(0)[index]
    shifts = StyleShifts(STAGES).double()
    assert torch.equal(shifts(stage, features), features)
    with torch.no_grad():
        shifts.means[index].copy_(torch.linspace(-1, 1, stage.n_channels))
        shifts.stds[index].copy_(torch.linspace(0, 2, stage.n_channels))
    x = np.moveaxis(features.numpy(), stage.axis, -1)
    axes = tuple(range(1, x.ndim - 1))
    mean, std = x.mean(axes, keepdims=True), np.sqrt(x.var(axes, keepdims=True) + EPS)
    beta, gamma = (values[index].detach().numpy() for values in (shifts.means, shifts.stds))
    expected = (x - mean) / std * (std + gamma) + mean + beta
    found = np.moveaxis(shifts(stage, features).detach().numpy(), stage.axis, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_a_gradient_reaches_only_what_it_should():
    a, b, c = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, 3.0, 5.0))
    value = a * b**2 * c
    found = reaching_only(value, [a, c])
    assert found.item() == 90.0
    grads = torch.autograd.grad(found + b, [a, b, c])
    assert [grad.item() for grad in grads] == [45.0, 1.0, 18.0]


def moved(staged, **params: float) -> CCFP:
    """An objective after some training: shifts and the second network are no longer as they started."""
    objective = staged.objective("ccfp", **params)
    assert isinstance(objective, CCFP)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return objective


def terms_of_ccfp(staged, objective: CCFP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classification, consistency and discrepancy, layer by layer."""
    images, labels = staged.batch.images, staged.batch.labels
    logits, maps = staged.network(images), staged.stage_maps(staged.network, images)
    values, shifted = images, []
    stages = {stage.name: stage for stage in objective.stages}
    for name, layer in objective.perturbed.get_submodule("featurizer").named_children():
        values = layer(values)
        if f"featurizer.{name}" in stages:
            values = objective.shifts(stages[f"featurizer.{name}"], values)
            shifted.append(values)
    perturbed = objective.perturbed.get_submodule("classifier")(values)
    discrepancy = domain_discrepancy([found.detach() for found in maps[:3]], shifted, objective.stages)
    classified = cross_entropy(logits, labels) + cross_entropy(perturbed, labels)
    return classified, consistency(logits, perturbed), discrepancy


def test_the_loss_has_its_terms_and_all_stages_but_the_last(staged):
    objective = moved(staged, consistency_weight=0.7, discrepancy_weight=0.3)
    assert [stage.name for stage in objective.stages] == ["featurizer.2", "featurizer.5", "featurizer.8"]
    classified, agreed, discrepancy = terms_of_ccfp(staged, objective)
    torch.testing.assert_close(staged.loss(objective), classified + 0.7 * agreed - 0.3 * discrepancy)


def test_the_discrepancy_trains_the_shifts_alone(staged):
    objective = moved(staged, discrepancy_weight=0.3)
    networks = [*staged.network.parameters(), *objective.perturbed.parameters()]
    shifts = list(objective.shifts.parameters())
    classified, agreed, discrepancy = terms_of_ccfp(staged, objective)
    expected = torch.autograd.grad(classified + agreed, networks, retain_graph=True)
    expected_shifts = torch.autograd.grad(classified + agreed - 0.3 * discrepancy, shifts)
    found = torch.autograd.grad(staged.loss(objective), networks + shifts)
    for one, other in zip(found, (*expected, *expected_shifts), strict=True):
        torch.testing.assert_close(one, other)


def test_training_the_shifts_increases_the_discrepancy(staged):
    objective = moved(staged, discrepancy_weight=10.0)
    before = terms_of_ccfp(staged, objective)[2].item()
    optimizer = torch.optim.SGD(objective.shifts.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        staged.loss(objective).backward()
        optimizer.step()
    assert terms_of_ccfp(staged, objective)[2].item() > before


def test_the_second_network_has_the_same_backbone_and_a_head_of_its_own(staged):
    objective = staged.objective("ccfp")
    ours, theirs = staged.network.state_dict(), objective.perturbed.state_dict()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    again = staged.objective("ccfp").perturbed.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in theirs.items())
    staged.loss(objective).backward()  # at the start both streams look alike, where a norm has no slope
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_one_stage_is_too_few(staged):
    setting = ObjectiveSetting(3, 4, 32, 6, staged.network, stages=lambda: staged.setting.stages()[:1])
    with pytest.raises(ConfigError, match="one stage only"):
        CCFP(setting, {})
