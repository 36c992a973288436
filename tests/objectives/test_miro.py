import numpy as np
import pytest
import torch
from torch import nn

from qtdog.conversion.attach import attach, sites
from qtdog.core.errors import ModelError
from qtdog.data.digits import RotatedDigits
from qtdog.models.network import Network
from qtdog.models.stages import find_stages
from qtdog.objectives.base import ObjectiveSetting
from qtdog.objectives.miro import MIRO, miro_penalty
from qtdog.training.build import build_components
from qtdog.training.protocol import resolve

SHAPES = [(4, 3, 5, 5), (4, 6, 2, 2), (4, 7, 8)]


def test_the_penalty_is_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    features, pretrained = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES] for _ in "ab")
    broadcast = [(1, 3, 1, 1), (1, 6, 1, 1), (1, 1, 8)]
    variances = [torch.rand(s, generator=generator, dtype=torch.float64) + 0.05 for s in broadcast]
    expected = 0.0
    for f, f0, var in zip(features, pretrained, variances, strict=True):
        wide = np.broadcast_to(var.numpy(), f.shape)
        expected += (np.log(wide) + (f.numpy() - f0.numpy()) ** 2 / wide).mean() / 2
    assert miro_penalty(features, pretrained, variances).item() == pytest.approx(expected, rel=1e-12)


def test_the_variances_start_at_a_tenth_one_per_channel(staged):
    objective = staged.objective("miro")
    assert [tuple(variance.shape) for variance in objective.variances()] == [(1, n, 1, 1) for n in (16, 32, 32, 32)]
    for variance in objective.variances():
        torch.testing.assert_close(variance, torch.full_like(variance, 0.1), rtol=1e-6, atol=0)


def test_the_loss_is_cross_entropy_and_the_penalty_between_now_and_the_start(staged):
    objective = staged.objective("miro", weight=0.3)
    started = staged.stage_maps(staged.network, staged.batch.images)
    with torch.no_grad():
        for parameter in staged.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for raw in objective.raw_variances:
            raw.add_(torch.rand_like(raw))
    now = staged.stage_maps(staged.network, staged.batch.images)
    variances = [(torch.log1p(raw.exp()) + 1e-5).reshape(-1, 1, 1) for raw in objective.raw_variances]
    penalty = sum(
        ((v.log() + (f - f0).square() / v).mean() / 2) for f, f0, v in zip(now, started, variances, strict=True)
    )
    expected = nn.functional.cross_entropy(staged.network(staged.batch.images), staged.batch.labels) + 0.3 * penalty
    torch.testing.assert_close(staged.loss(objective), expected)


def test_gradients_reach_network_and_encoders_but_not_the_copy(staged):
    objective = staged.objective("miro")
    with torch.no_grad():
        staged.network.featurizer.get_parameter("0.weight").mul_(1.5)
    staged.loss(objective).backward()
    for parameter in (*staged.network.parameters(), *objective.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in objective.pretrained.parameters())
    without = staged.objective("miro", weight=0.0)
    staged.network.zero_grad()
    staged.loss(without).backward()
    assert all(raw.grad is not None and not raw.grad.any() for raw in without.raw_variances)


def test_the_copy_is_in_no_list_and_stays_as_it_was(staged):
    objective = staged.objective("miro")
    expected = {name: value.clone() for name, value in staged.network.state_dict().items()}
    assert set(objective.state_dict()) == {f"raw_variances.{i}" for i in range(4)}
    assert len(list(objective.parameters())) == 4
    attach(staged.network, bits=4, exclude=["classifier"]).enable()
    objective.train()
    with torch.no_grad():
        for parameter in staged.network.parameters():
            parameter.add_(1)
    copy = objective.pretrained
    assert not copy.training
    assert not sites(copy)
    assert copy.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in copy.state_dict().items())


def test_in_a_run_the_encoders_learn_ten_times_as_fast_and_the_copy_comes_again(short_config):
    digits = RotatedDigits()
    config = resolve(short_config(objective={"name": "miro"}), digits)
    one, other = (build_components(config, digits) for _ in range(2))
    lr = config.optimizer.lr
    assert one.base_lrs == pytest.approx((lr, lr, 10 * lr))
    assert isinstance(one.objective, MIRO)
    assert isinstance(other.objective, MIRO)
    held = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in one.objective.pretrained.parameters()}
    copies = [objective.pretrained.state_dict() for objective in (one.objective, other.objective)]
    assert all(torch.equal(value, copies[1][name]) for name, value in copies[0].items())


def test_a_backbone_without_stages_is_refused():
    network = Network(nn.Flatten(), nn.Linear(4, 2), freeze_bn=True)
    setting = ObjectiveSetting(2, 2, 4, 8, network, stages=lambda: find_stages(network, (1, 2, 2)))
    with pytest.raises(ModelError, match="has no stages"):
        MIRO(setting, {})
