import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qtdog.core.errors import ConfigError
from qtdog.core.feature_maps import Stage
from qtdog.objectives.base import ObjectiveSetting
from qtdog.objectives.sagnet import SagNet, content_randomized, style_randomized, uniformity_loss

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
