"""Stages, MixStyle, and ARM's context."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qtdog.conversion.attach import attach
from qtdog.core.errors import ConfigError, ModelError
from qtdog.core.feature_maps import EPS, Stage
from qtdog.models.backbones import create_network
from qtdog.models.feature_layers import Context, MixStyle, find_stages, mix_styles
from qtdog.models.network import WIDTHS, Network, digits_cnn


def create(backbone: str, size: int = 64, channels: int = 3, **changes: Any) -> Network:
    options: dict[str, Any] = {"n_classes": 2, "weights": "none", "freeze_bn": True, "seed": 0} | changes
    return create_network(backbone, channels=channels, image_size=size, **options)


RESNET = ["layer1", "layer2", "layer3", "layer4"]
STAGES = ["stages.0", "stages.1", "stages.2", "stages.3"]
CASES = [
    ("test_resnet", RESNET, [32, 48, 192, 96], 1),
    ("resnet10t", RESNET, [64, 128, 256, 512], 1),
    ("tf_efficientnet_lite0", [f"blocks.{i}" for i in (0, 1, 2, 4, 6)], [16, 24, 40, 112, 320], 1),
    ("mobilenetv3_small_050", [f"blocks.{i}" for i in (0, 1, 3, 5)], [8, 16, 24, 288], 1),  # its stem is `bn1`
    ("regnety_002", ["s1", "s2", "s3", "s4"], [24, 56, 152, 368], 1),
    ("test_convnext", STAGES, [24, 32, 48, 64], 1),
    ("test_mambaout", STAGES, [16, 32, 48, 64], 3),  # channels last
    ("test_vit2", [f"blocks.{i}" for i in (1, 3, 5, 7)], [64] * 4, 2),  # eight blocks
    ("test_vit", [f"blocks.{i}" for i in (1, 2, 4, 5)], [64] * 4, 2),  # six
    ("digits_cnn", ["2", "5", "8", "11"], [16, 32, 32, 32], 1),
]


@pytest.mark.parametrize(("backbone", "names", "n_channels", "axis"), CASES)
def test_stages_are_found_in_order_with_the_layout_of_what_comes_out(backbone, names, n_channels, axis):
    network = create(backbone)
    stages = find_stages(network, (3, 64, 64))
    assert [stage.name for stage in stages] == [f"featurizer.{name}" for name in names]
    assert [stage.n_channels for stage in stages] == n_channels
    assert {stage.axis for stage in stages} == {axis}
    shapes: list[torch.Size] = []
    for stage in stages:
        module = network.get_submodule(stage.name)
        module.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    network(torch.zeros(2, 3, 64, 64))
    assert [len(shape) for shape in shapes] == [stage.ndim for stage in stages]
    assert [shape[stage.axis] for shape, stage in zip(shapes, stages, strict=True)] == n_channels


def test_looking_for_them_leaves_the_network_as_it_was():
    network = create("test_resnet", freeze_bn=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    find_stages(network, (3, 64, 64))
    assert network.training
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    assert find_stages(network.eval(), (3, 64, 64))
    assert not network.training


@pytest.mark.parametrize("featurizer", [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.ReLU())])
def test_a_backbone_without_stages_is_refused(featurizer: nn.Module):
    network = Network(nn.Sequential(nn.Conv2d(3, 3, 1), featurizer), nn.Linear(3, 2), freeze_bn=True)
    with pytest.raises(ModelError, match=r"\(Sequential\) has no stages.*like resnet18"):
        find_stages(network, (3, 4, 4))


def test_a_backbone_that_gives_lists_is_refused():
    with pytest.raises(ModelError, match=r"\(CrossVit\) has no stages"):
        find_stages(create("crossvit_tiny_240", size=240), (3, 240, 240))


LAYOUTS = [
    (Stage("a", 5, axis=1, ndim=4), (4, 5, 6, 3), (2, 3)),
    (Stage("a", 5, axis=3, ndim=4), (4, 6, 3, 5), (1, 2)),
    (Stage("a", 5, axis=2, ndim=3), (4, 18, 5), (1,)),
]
PARTNER = torch.tensor([2, 0, 3, 1])


def with_layer(layer: str = "mixstyle", backbone: str = "digits_cnn", size: int = 12, **params: Any) -> Network:
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
    plain, mixing = with_layer("none").eval(), with_layer(p=1.0).eval()
    assert torch.equal(mixing(images()), plain(images()))
    assert mixing.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    mixing(images())
    assert torch.equal(torch.rand(2), expected)  # and draws nothing


def test_training_mixes_with_draws_from_the_global_state():
    plain, mixing = with_layer("none"), with_layer(p=1.0)
    assert not torch.allclose(run(mixing), plain(images()))
    assert torch.equal(run(mixing, seed=1), run(mixing, seed=1))
    assert not torch.equal(run(mixing, seed=1), run(mixing, seed=2))
    assert torch.equal(run(with_layer(p=0.0)), plain(images()))


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_each_stage_mixes_with_probability_p(p: float):
    mixing = with_layer(p=p, n_stages=1, alpha=1.0)
    plain = with_layer("none")(images())
    n = 400
    mixed = sum(not torch.equal(run(mixing, seed), plain) for seed in range(n))
    assert abs(mixed / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_every_image_has_a_weight_of_its_own_from_a_u_shaped_beta():
    network = with_layer(p=1.0, n_stages=1)
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
    featurizer = with_layer(n_stages=n_stages).featurizer
    assert [name for name, module in featurizer.named_modules() if module._forward_hooks] == hooked


@pytest.mark.parametrize(("backbone", "size"), [("test_vit", 32), ("test_mambaout", 64), ("test_resnet", 32)])
def test_tokens_and_both_orders_of_channels_train(backbone: str, size: int):
    network = with_layer(backbone=backbone, size=size, p=1.0)
    torch.manual_seed(0)
    logits = network(images(size))
    assert not torch.allclose(logits, with_layer("none", backbone, size)(images(size)))
    logits.square().sum().backward()
    grads = [parameter.grad for parameter in network.featurizer.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_a_copy_mixes_by_its_own_mode():
    network = with_layer(p=1.0)
    twin = copy.deepcopy(network).eval()
    plain = with_layer("none")(images())
    assert torch.equal(twin(images()), plain)
    assert not torch.equal(run(network), plain)
    network.eval()
    assert not torch.equal(run(twin.train()), plain)


def test_it_works_with_quantizers():
    network = with_layer(p=1.0)
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
        with_layer(**params)


def with_context(layer: str = "context", backbone: str = "digits_cnn", **changes: Any) -> Network:
    options: dict[str, Any] = {"n_classes": 3, "channels": 1, "image_size": 12, "weights": "none", "freeze_bn": True}
    options |= {"seed": 0, "feature_params": {"width": 4} if layer == "context" else {}} | changes
    return create_network(backbone, feature_layer=layer, **options)


def random_images(n: int = 7, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_the_context_is_the_mean_over_the_images_of_a_domain():
    context, batch = Context(channels=1, n_context=2, width=4).double(), random_images().double()
    found = context.eval()(batch, [3, 4])
    assert found.shape == (7, 3, 12, 12)
    assert torch.equal(found[:, :1], batch)
    maps = context.layers(batch)
    for part in (slice(0, 3), slice(3, 7)):
        expected = maps[part].sum(0) / len(maps[part])
        torch.testing.assert_close(found[part, 1:], expected.expand(len(maps[part]), 2, 12, 12))


def test_without_sizes_all_images_are_of_one_domain():
    context = Context(channels=1, n_context=1, width=4).eval()
    assert torch.equal(context(random_images()), context(random_images(), [7]))
    assert not torch.equal(context(random_images()), context(random_images(), [3, 4]))


@pytest.mark.parametrize(("group", "sizes"), [(3, [3, 3, 1]), (7, [7]), (100, [7]), (1, [1] * 7)])
def test_groups_share_a_context_where_no_domains_are_given(group, sizes):
    torch.manual_seed(0)
    grouped, plain = (Context(channels=1, n_context=2, width=4, group=n).double().eval() for n in (group, 0))
    grouped.load_state_dict(plain.state_dict())
    batch = random_images().double()
    torch.testing.assert_close(grouped(batch), plain(batch, sizes), rtol=1e-6, atol=1e-7)
    assert torch.equal(grouped(batch, [3, 4]), plain(batch, [3, 4]))


def test_a_group_exports_with_any_number_of_images():
    context = Context(channels=1, n_context=1, width=4, group=3).eval()
    exported = torch.export.export(context, (random_images(5),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for n in (4, 7):
        torch.testing.assert_close(exported.module()(random_images(n)), context(random_images(n)))


def test_the_backbone_takes_the_context_as_a_channel_and_keeps_its_names():
    plain, network = with_context("none"), with_context()
    assert network.featurizer.get_parameter("0.weight").shape == (16, 2, 3, 3)
    added = network.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() < network.state_dict().keys()
    assert {name.split(".")[0] for name in added} == {"context"}
    assert network(random_images()).shape == (7, 3)
    two = with_context(feature_params={"channels": 2, "width": 4})
    assert two.featurizer.get_parameter("0.weight").shape[1] == 3


def test_an_answer_depends_on_the_images_beside_it():
    network = with_context().eval()
    whole = network(random_images())
    assert not torch.allclose(whole[:3], network(random_images()[:3]))
    torch.testing.assert_close(network.features(random_images(), [3, 4])[:3], network.features(random_images()[:3]))


def test_its_batch_norm_learns_while_that_of_the_backbone_is_frozen():
    network = with_context(backbone="test_resnet", image_size=32)
    before = {name: value.clone() for name, value in network.state_dict().items() if "running" in name}
    network.train()(torch.rand(4, 1, 32, 32))
    moved = {name for name, value in before.items() if not torch.equal(network.state_dict()[name], value)}
    assert moved == {f"context.layers.{i}.running_{what}" for i in (1, 4) for what in ("mean", "var")}


def test_the_seed_decides_its_start_and_the_global_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = with_context(seed=1), with_context(seed=1), with_context(seed=2)
    assert torch.equal(torch.rand(3), expected)
    name = "context.layers.0.weight"
    assert torch.equal(one.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert torch.equal(with_context("none", seed=1).classifier.weight, one.classifier.weight)


def test_its_layers_are_quantized_too():
    layers = attach(with_context(), exclude=["classifier"]).layers
    assert {name for name in layers if name.startswith("context")} == {f"context.layers.{i}" for i in (0, 3, 6)}


@pytest.mark.parametrize(
    ("layer", "params", "message"),
    [
        ("contxt", {}, "unknown feature layer 'contxt'; did you mean 'context'"),
        ("context", {"width": 100_000}, "width of feature layer 'context' must lie in 1 … 512"),
        ("none", {"p": 0.5}, "feature layer 'none' has no hyper-parameter"),
    ],
)
def test_a_wrong_name_or_value_is_refused(layer: str, params: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        with_context(layer, feature_params=params)
