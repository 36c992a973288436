"""Maps of networks that look at a known place, and scores that know a good map from a bad one."""

import builtins

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qtdog.analysis.gradcam import as_images, faithfulness, heatmaps
from qtdog.core.errors import ConfigError, ModelError
from qtdog.core.feature_maps import Stage
from qtdog.models.backbones import create_network
from qtdog.models.network import Network


class Corner(nn.Sequential):
    """Features of the upper left quarter alone, behind a group norm where the map is taken."""

    def __init__(self) -> None:
        first = nn.Conv2d(1, 2, 1, bias=False)
        first.weight.data.fill_(1.0)
        super().__init__(first, nn.GroupNorm(1, 2), UpperLeft())


class UpperLeft(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        half = maps.shape[-1] // 2
        return maps[..., :half, :half].square().mean((2, 3))


@pytest.fixture
def corner() -> Network:
    head = nn.Linear(2, 2)
    head.weight.data.copy_(torch.tensor([[4.0, 4.0], [-4.0, -4.0]]))
    return Network(Corner(), head, freeze_bn=True).eval()


def quarters(heat: np.ndarray) -> list[float]:
    half = len(heat) // 2
    parts = (heat[:half, :half], heat[:half, half:], heat[half:, :half], heat[half:, half:])
    return [float(part.mean()) for part in parts]


def test_a_map_is_hot_where_the_network_looks(corner: Network):
    image = torch.zeros(1, 1, 8, 8)
    image[..., 1:3, 1:3] = 1.0  # the object
    image[..., 5:7, 5:7] = 1.0  # the same, where the network does not look
    (heat,) = heatmaps(corner, image, [0])
    assert heat.shape == (8, 8)
    inner = heat[1:3, 1:3].mean()
    assert inner > 0.5
    assert all(parameter.grad is None for parameter in corner.parameters())


@pytest.mark.parametrize(
    ("backbone", "size"), [("tf_efficientnet_lite0", 64), ("vit_tiny_patch16_224", 64), ("digits_cnn", 16)]
)
def test_convolutions_and_transformers_are_mapped(backbone: str, size: int):
    channels = 1 if backbone == "digits_cnn" else 3
    network = create_network(
        backbone, n_classes=3, channels=channels, image_size=size, weights="none", freeze_bn=True, seed=0
    ).eval()
    heat = heatmaps(network, torch.randn(2, channels, size, size), [0, 2])
    assert heat.shape == (2, size, size)
    assert heat.min() >= 0
    assert heat.max() <= 1
    with pytest.raises(ConfigError, match="--stage 9"):
        heatmaps(network, torch.randn(1, channels, size, size), [0], stage=9)


def test_tokens_find_their_places_and_the_class_token_is_left_out():
    tokens = torch.arange(5.0).reshape(1, 5, 1)
    placed = as_images(tokens, Stage("blocks.0", 1, axis=2, ndim=3))
    assert placed.tolist() == [[[[1.0, 2.0], [3.0, 4.0]]]]
    nhwc = torch.zeros(2, 4, 4, 8)
    assert as_images(nhwc, Stage("stages.0", 8, axis=3, ndim=4)).shape == (2, 8, 4, 4)


def test_a_true_map_is_more_faithful_than_a_wrong_and_a_random_one():
    image = torch.zeros(1, 16, 16)
    image[:, 2:6, 2:6] = 1.0

    def predict(images: Tensor) -> Tensor:
        evidence = images[:, 0, 2:6, 2:6].mean((1, 2)) * 12 - 6
        return torch.stack([evidence, torch.zeros_like(evidence)], 1)

    random = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    true, blind, wrong = (faithfulness(predict, image, heat, 0) for heat in (image[0], random, 1 - image[0]))
    assert true.deletion < blind.deletion < wrong.deletion
    assert true.insertion > blind.insertion > wrong.insertion


def test_without_grad_cam_the_extra_is_named(corner: Network, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("pytorch_grad_cam"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModelError, match=r"pip install 'qtdog\[cam\]'"):
        heatmaps(corner, torch.zeros(1, 1, 8, 8), [0])
