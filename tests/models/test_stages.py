from typing import Any

import pytest
import torch
from torch import nn

from qtdog.core.errors import ModelError
from qtdog.models.backbones import create_network
from qtdog.models.network import Network
from qtdog.models.stages import find_stages


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
