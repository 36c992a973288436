from typing import Any

import pytest
import torch
from torch import Tensor

from qtdog.conversion.attach import attach
from qtdog.core.errors import ConfigError
from qtdog.models.backbones import create_network
from qtdog.models.feature_layers import Context
from qtdog.models.network import Network


def create(layer: str = "context", backbone: str = "digits_cnn", **changes: Any) -> Network:
    options: dict[str, Any] = {"n_classes": 3, "channels": 1, "image_size": 12, "weights": "none", "freeze_bn": True}
    options |= {"seed": 0, "feature_params": {"width": 4} if layer == "context" else {}} | changes
    return create_network(backbone, feature_layer=layer, **options)


def images(n: int = 7, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_the_context_is_the_mean_over_the_images_of_a_domain():
    context, batch = Context(channels=1, n_context=2, width=4).double(), images().double()
    found = context.eval()(batch, [3, 4])
    assert found.shape == (7, 3, 12, 12)
    assert torch.equal(found[:, :1], batch)
    maps = context.layers(batch)
    for part in (slice(0, 3), slice(3, 7)):
        expected = maps[part].sum(0) / len(maps[part])
        torch.testing.assert_close(found[part, 1:], expected.expand(len(maps[part]), 2, 12, 12))


def test_without_sizes_all_images_are_of_one_domain():
    context = Context(channels=1, n_context=1, width=4).eval()
    assert torch.equal(context(images()), context(images(), [7]))
    assert not torch.equal(context(images()), context(images(), [3, 4]))


@pytest.mark.parametrize(("group", "sizes"), [(3, [3, 3, 1]), (7, [7]), (100, [7]), (1, [1] * 7)])
def test_groups_share_a_context_where_no_domains_are_given(group, sizes):
    torch.manual_seed(0)
    grouped, plain = (Context(channels=1, n_context=2, width=4, group=n).double().eval() for n in (group, 0))
    grouped.load_state_dict(plain.state_dict())
    batch = images().double()
    torch.testing.assert_close(grouped(batch), plain(batch, sizes), rtol=1e-6, atol=1e-7)
    assert torch.equal(grouped(batch, [3, 4]), plain(batch, [3, 4]))


def test_a_group_exports_with_any_number_of_images():
    context = Context(channels=1, n_context=1, width=4, group=3).eval()
    exported = torch.export.export(context, (images(5),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for n in (4, 7):
        torch.testing.assert_close(exported.module()(images(n)), context(images(n)))


def test_the_backbone_takes_the_context_as_a_channel_and_keeps_its_names():
    plain, network = create("none"), create()
    assert network.featurizer.get_parameter("0.weight").shape == (16, 2, 3, 3)
    added = network.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() < network.state_dict().keys()
    assert {name.split(".")[0] for name in added} == {"context"}
    assert network(images()).shape == (7, 3)
    two = create(feature_params={"channels": 2, "width": 4})
    assert two.featurizer.get_parameter("0.weight").shape[1] == 3


def test_an_answer_depends_on_the_images_beside_it():
    network = create().eval()
    whole = network(images())
    assert not torch.allclose(whole[:3], network(images()[:3]))
    torch.testing.assert_close(network.features(images(), [3, 4])[:3], network.features(images()[:3]))


def test_its_batch_norm_learns_while_that_of_the_backbone_is_frozen():
    network = create(backbone="test_resnet", image_size=32)
    before = {name: value.clone() for name, value in network.state_dict().items() if "running" in name}
    network.train()(torch.rand(4, 1, 32, 32))
    moved = {name for name, value in before.items() if not torch.equal(network.state_dict()[name], value)}
    assert moved == {f"context.layers.{i}.running_{what}" for i in (1, 4) for what in ("mean", "var")}


def test_the_seed_decides_its_start_and_the_global_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = create(seed=1), create(seed=1), create(seed=2)
    assert torch.equal(torch.rand(3), expected)
    name = "context.layers.0.weight"
    assert torch.equal(one.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert torch.equal(create("none", seed=1).classifier.weight, one.classifier.weight)


def test_its_layers_are_quantized_too():
    layers = attach(create(), exclude=["classifier"]).layers
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
        create(layer, feature_params=params)
