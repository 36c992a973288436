import torch
from torch import nn

from qtdog.models.backbones import create_network
from qtdog.models.network import Network, freeze_batch_norm_


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
