"""The network and its featurizer: frozen batch norm, the small network for digits, further input channels."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from qtdog.models.backbones import create_network
from qtdog.models.network import WIDTHS, FeaturizerSpec, Network, build_featurizer, digits_cnn, freeze_batch_norm_


def small(*, freeze_bn: bool) -> Network:
    torch.manual_seed(0)
    featurizer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Network(featurizer, nn.Linear(4, 5), freeze_bn=freeze_bn)


def train_one_step(network: nn.Module, images: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    network.train()
    nn.functional.cross_entropy(network(images), torch.arange(len(images)) % 5).backward()
    optimizer.step()


def test_forward_is_the_classifier_of_the_features():
    network = small(freeze_bn=True)
    images = torch.randn(6, 3, 8, 8)
    features = network.features(images)
    assert features.shape == (6, 4)
    assert torch.equal(network(images), features @ network.classifier.weight.T + network.classifier.bias)


def test_frozen_statistics_stay_while_the_affine_parameters_train():
    network = create_network("resnet18", n_classes=5, channels=3, image_size=32, weights="none", freeze_bn=True, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train_one_step(network, torch.randn(8, 3, 32, 32))
    after = network.state_dict()
    statistics = [name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(statistics) == 60
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    for name in ("featurizer.bn1.weight", "featurizer.bn1.bias", "featurizer.conv1.weight", "classifier.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_statistics_move_when_they_are_not_frozen():
    network = small(freeze_bn=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train_one_step(network, torch.randn(8, 3, 8, 8))
    assert not torch.equal(before["featurizer.1.running_mean"], network.state_dict()["featurizer.1.running_mean"])


def test_train_and_eval_switch_everything_but_frozen_batch_norm():
    network = small(freeze_bn=True)
    assert network.training
    assert network.get_submodule("featurizer.0").training
    assert not network.get_submodule("featurizer.1").training
    assert not any(module.training for module in network.eval().modules())
    assert network.train() is network
    assert network.classifier.training
    assert not network.get_submodule("featurizer.1").training


def test_every_kind_of_batch_norm_is_frozen_and_nothing_else():
    kinds = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.Dropout(), nn.GroupNorm(1, 2)])
    freeze_batch_norm_(kinds)
    assert [kind.training for kind in kinds] == [False, False, False, True, True]


class Reference(nn.Module):
    """The published network, written out layer by layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, 64, 3, 1, padding=1), nn.GroupNorm(8, 64)
        self.conv2, self.norm2 = nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.GroupNorm(8, 128)
        self.conv3, self.norm3 = nn.Conv2d(128, 128, 3, 1, padding=1), nn.GroupNorm(8, 128)
        self.conv4, self.norm4 = nn.Conv2d(128, 128, 3, 1, padding=1), nn.GroupNorm(8, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(torch.relu(self.conv1(x)))
        x = self.norm2(torch.relu(self.conv2(x)))
        x = self.norm3(torch.relu(self.conv3(x)))
        x = self.norm4(torch.relu(self.conv4(x)))
        return x.mean((2, 3))


def test_mnist_cnn_computes_what_the_published_network_does():
    ours, theirs = digits_cnn(WIDTHS["mnist_cnn"], channels=2), Reference(2)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    images = torch.rand(3, 2, 28, 28, generator=generator)
    torch.testing.assert_close(ours(images), theirs(images))


def test_the_small_one_has_a_quarter_of_the_width():
    narrow = digits_cnn(WIDTHS["digits_cnn"], channels=1)
    assert narrow(torch.zeros(2, 1, 28, 28)).shape == (2, 32)
    assert [width * 4 for width in WIDTHS["digits_cnn"]] == list(WIDTHS["mnist_cnn"])


def test_width_must_fit_the_groups():
    with pytest.raises(ValueError, match="num_groups"):
        digits_cnn((12, 32), channels=1)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channel_i_has_the_weights_of_rgb_channel_i_mod_3(channels):
    state = timm.create_model("resnet18.tv_in1k").state_dict()
    spec = FeaturizerSpec("resnet18.tv_in1k", channels=channels, image_size=32)
    weight = build_featurizer(spec, pretrained=True, state=state).get_parameter("conv1.weight")
    for i in range(channels):
        torch.testing.assert_close(weight[:, i], state["conv1.weight"][:, i % 3])


def test_a_context_of_zeros_changes_no_feature():
    state = timm.create_model("resnet18.tv_in1k").state_dict()
    specs = [FeaturizerSpec("resnet18.tv_in1k", channels=n, image_size=32) for n in (3, 4)]
    plain, wide = (build_featurizer(spec, pretrained=True, state=state).eval() for spec in specs)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = wide(torch.cat([images, torch.zeros(2, 1, 32, 32)], 1))
        torch.testing.assert_close(found, plain(images), rtol=1e-4, atol=1e-5)
