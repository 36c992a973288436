from typing import Any

import pytest
import torch

from qtdog.core.errors import ModelError
from qtdog.models.backbones import backbone_names, create_network, preprocessing
from qtdog.models.network import Network


def create(backbone: str, **changes: Any) -> Network:
    options: dict[str, Any] = {"n_classes": 5, "channels": 3, "image_size": 64, "weights": "none"}
    options |= {"freeze_bn": True, "seed": 0} | changes
    return create_network(backbone, **options)


@pytest.mark.parametrize(
    ("backbone", "features"),
    [
        ("test_resnet", 96),
        ("resnet18.a1_in1k", 512),
        ("mobilenetv3_small_050", 1024),  # its attribute num_features says 288: the head widens it
        ("vit_tiny_patch16_224", 192),  # takes 64 pixels: the position table is made for the images
        ("digits_cnn", 32),
        ("mnist_cnn", 128),
    ],
)
def test_the_head_fits_what_comes_out(backbone: str, features: int):
    network = create(backbone).eval()
    assert network.classifier.in_features == features
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    assert network.features(torch.zeros(2, 3, 64, 64)).shape == (2, features)


@pytest.mark.parametrize("backbone", ["test_resnet", "digits_cnn"])
def test_the_seed_decides_the_start_and_nothing_else_does(backbone: str):
    first = create(backbone, seed=1).state_dict()
    torch.manual_seed(99)
    again = create(backbone, seed=1).state_dict()
    other = create(backbone, seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("classifier.weight", "classifier.bias", next(iter(first))):
        assert not torch.equal(first[name], other[name])


def test_the_head_starts_the_same_whatever_the_featurizer_draws():
    narrow, wide = create("test_resnet", channels=1), create("test_resnet", channels=3)
    assert torch.equal(narrow.classifier.weight, wide.classifier.weight)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    create("digits_cnn")
    assert torch.equal(torch.rand(3), expected)


def test_a_network_is_in_training_mode_with_batch_norm_frozen():
    network = create("test_resnet")
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert network.training
    assert network.pretraining == "none"


@pytest.mark.parametrize(
    ("given", "meant"), [("resnet5", "resnet50"), ("ResNet50", "resnet50"), ("digit_cnn", "digits_cnn")]
)
def test_an_unknown_backbone_names_the_nearest(given: str, meant: str):
    with pytest.raises(ModelError, match=f"unknown backbone '{given}'; did you mean '{meant}'"):
        create(given)
    with pytest.raises(ModelError, match=f"did you mean '{meant}'"):
        preprocessing(given)


@pytest.mark.parametrize("given", ["", "hf-hub:timm/resnet18.a1_in1k", "local-dir:x", "no such thing at all"])
def test_only_names_are_backbones(given: str):
    with pytest.raises(ModelError, match="unknown backbone"):
        create(given)


def test_an_unknown_tag_lists_the_tags():
    with pytest.raises(ModelError, match=r"unknown backbone 'resnet18\.a1_in2k'; did you mean 'resnet18\.a1_in1k'\?"):
        create("resnet18.a1_in2k")


@pytest.mark.parametrize(("backbone", "size"), [("test_maxvit", 97), ("test_vit", 8)])
def test_images_of_a_size_that_does_not_fit(backbone: str, size: int):
    with pytest.raises(ModelError, match=rf"'{backbone}' cannot take images of 3 × {size} × {size}.*--image-size 160"):
        create(backbone, image_size=size)


def test_preprocessing():
    assert preprocessing("tf_efficientnet_lite0") == ((0.5,) * 3, (0.5,) * 3)
    assert preprocessing("resnet50") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert preprocessing("mnist_cnn") == ((0.0,), (1.0,))


def test_preprocessing_has_one_entry_per_channel():
    assert preprocessing("digits_cnn", channels=3) == ((0.0,) * 3, (1.0,) * 3)
    mean, std = preprocessing("resnet50", channels=1)
    assert mean == pytest.approx((0.449,), abs=1e-3)
    assert std == pytest.approx((0.226,), abs=1e-3)


def test_backbone_names_are_sorted_and_can_all_be_looked_up():
    names = backbone_names()
    assert names == sorted(names)
    assert {"digits_cnn", "mnist_cnn", "resnet50", "tf_efficientnet_lite0"} <= set(names)
    assert all(len(mean) == len(std) == 3 for mean, std in (preprocessing(name, channels=3) for name in names[::100]))
