import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qtdog.conversion.attach import attach
from qtdog.core.errors import ConfigError, ModelError
from qtdog.core.feature_maps import EPS, Stage
from qtdog.models.backbones import create_network
from qtdog.models.feature_layers import MixStyle, mix_styles
from qtdog.models.featurizers import WIDTHS, digits_cnn
from qtdog.models.network import Network

LAYOUTS = [
    (Stage("a", 5, axis=1, ndim=4), (4, 5, 6, 3), (2, 3)),
    (Stage("a", 5, axis=3, ndim=4), (4, 6, 3, 5), (1, 2)),
    (Stage("a", 5, axis=2, ndim=3), (4, 18, 5), (1,)),
]
PARTNER = torch.tensor([2, 0, 3, 1])


def create(layer: str = "mixstyle", backbone: str = "digits_cnn", size: int = 12, **params: Any) -> Network:
    options: dict[str, Any] = {"n_classes": 3, "channels": 1, "image_size": size, "weights": "none", "freeze_bn": True}
    return create_network(backbone, seed=0, feature_layer=layer, feature_params=params, **options)


def images(size: int = 12) -> Tensor:
    return torch.rand(6, 1, size, size, generator=torch.Generator().manual_seed(3))


def run(network: Network, seed: int = 0, size: int = 12) -> Tensor:
    torch.manual_seed(seed)
    return network(images(size))


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + torch.arange(4.0).reshape(
        -1, *[1] * (len(shape) - 1)
    )


@pytest.mark.parametrize(("stage", "shape", "positions"), LAYOUTS)
def test_the_output_has_the_mixed_mean_and_deviation(stage, shape, positions):
    features, weight = draw(shape), torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    mixed = mix_styles(features, stage, weight, PARTNER).numpy()
    x, share = features.numpy(), weight.numpy().reshape(-1, *[1] * (len(shape) - 1))
    mean, std = x.mean(positions, keepdims=True), np.sqrt(x.var(positions, keepdims=True) + EPS)
    new_mean = share * mean + (1 - share) * mean[PARTNER.numpy()]
    new_std = share * std + (1 - share) * std[PARTNER.numpy()]
    np.testing.assert_allclose(mixed, new_std * (x - mean) / std + new_mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(mixed.mean(positions, keepdims=True), new_mean, rtol=1e-10)
    np.testing.assert_allclose(mixed.std(positions, keepdims=True), new_std, rtol=1e-5)


@pytest.mark.parametrize(("stage", "shape", "positions"), LAYOUTS)
def test_weight_one_changes_nothing_at_all(stage, shape, positions):
    features = draw(shape).float()
    assert torch.equal(mix_styles(features, stage, torch.ones(4), PARTNER), features)


def test_no_gradient_passes_through_the_statistics():
    stage = LAYOUTS[0][0]
    features = draw((4, 5, 6, 3)).requires_grad_()
    weight = torch.full((4,), 0.5, dtype=torch.float64)
    mix_styles(features, stage, weight, PARTNER).sum().backward()
    std = (features.detach().var((2, 3), correction=0, keepdim=True) + EPS).sqrt()
    gain = (0.5 * std + 0.5 * std[PARTNER]) / std
    assert features.grad is not None
    torch.testing.assert_close(features.grad, gain.expand_as(features))


def test_evaluation_is_that_of_the_plain_backbone():
    plain, mixing = create("none").eval(), create(p=1.0).eval()
    assert torch.equal(mixing(images()), plain(images()))
    assert mixing.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    mixing(images())
    assert torch.equal(torch.rand(2), expected)  # and draws nothing


def test_training_mixes_with_draws_from_the_global_state():
    plain, mixing = create("none"), create(p=1.0)
    assert not torch.allclose(run(mixing), plain(images()))
    assert torch.equal(run(mixing, seed=1), run(mixing, seed=1))
    assert not torch.equal(run(mixing, seed=1), run(mixing, seed=2))
    assert torch.equal(run(create(p=0.0)), plain(images()))


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_each_stage_mixes_with_probability_p(p: float):
    mixing = create(p=p, n_stages=1, alpha=1.0)
    plain = create("none")(images())
    n = 400
    mixed = sum(not torch.equal(run(mixing, seed), plain) for seed in range(n))
    assert abs(mixed / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_every_image_has_a_weight_of_its_own_from_a_u_shaped_beta():
    network = create(p=1.0, n_stages=1)
    (hook,) = network.get_submodule("featurizer.2")._forward_hooks.values()
    n = 4000
    features = torch.randn(n, 1, 1, 1)  # with one position an image is its mean, so the output is the mixed mean
    torch.manual_seed(0)
    mixed = hook(network.get_submodule("featurizer.2"), (), features)
    torch.manual_seed(0)
    torch.rand(())
    concentration = torch.full((n,), 0.1)
    weight = torch.distributions.Beta(concentration, concentration).sample()
    partner = torch.randperm(n)
    expected = weight * features.flatten() + (1 - weight) * features.flatten()[partner]
    torch.testing.assert_close(mixed.flatten(), expected)
    assert (weight < 0.05).float().mean() + (weight > 0.95).float().mean() > 0.7  # Beta(0.1, 0.1): 0.75
    assert sorted(partner.tolist()) == list(range(n))


@pytest.mark.parametrize(("n_stages", "hooked"), [(3, ["2", "5", "8"]), (1, ["2"]), (9, ["2", "5", "8"])])
def test_it_goes_after_the_first_stages_and_never_after_the_last(n_stages: int, hooked: list[str]):
    featurizer = create(n_stages=n_stages).featurizer
    assert [name for name, module in featurizer.named_modules() if module._forward_hooks] == hooked


@pytest.mark.parametrize(("backbone", "size"), [("test_vit", 32), ("test_mambaout", 64), ("test_resnet", 32)])
def test_tokens_and_both_orders_of_channels_train(backbone: str, size: int):
    network = create(backbone=backbone, size=size, p=1.0)
    torch.manual_seed(0)
    logits = network(images(size))
    assert not torch.allclose(logits, create("none", backbone, size)(images(size)))
    logits.square().sum().backward()
    grads = [parameter.grad for parameter in network.featurizer.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_a_copy_mixes_by_its_own_mode():
    network = create(p=1.0)
    twin = copy.deepcopy(network).eval()
    plain = create("none")(images())
    assert torch.equal(twin(images()), plain)
    assert not torch.equal(run(network), plain)
    network.eval()
    assert not torch.equal(run(twin.train()), plain)


def test_it_works_with_quantizers():
    network = create(p=1.0)
    attach(network, bits=4, exclude=["classifier"]).enable()
    assert not torch.equal(run(network), run(network, seed=1))
    assert torch.equal(network.eval()(images()), network(images()))


def test_one_stage_is_too_few():
    network = Network(digits_cnn(WIDTHS["digits_cnn"], channels=1)[:3], torch.nn.Linear(1, 1), freeze_bn=True)
    with pytest.raises(ModelError, match="one stage only"):
        MixStyle("mixstyle", {}).install_(network, (1, 8, 8))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"p": 1.5}, "p of feature layer 'mixstyle' must lie in 0 … 1"),
        ({"alpha": 0.0}, "alpha of feature layer 'mixstyle'"),
        ({"alfa": 0.1}, "did you mean 'alpha'"),
    ],
)
def test_a_wrong_hyper_parameter_is_refused(params: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        create(**params)
