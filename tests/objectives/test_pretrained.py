"""MIRO and margin metric softmax against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from qtdog.conversion.attach import attach, sites
from qtdog.core.errors import ConfigError, ModelError
from qtdog.data.known_datasets import RotatedDigits
from qtdog.models.feature_layers import find_stages
from qtdog.models.network import Network
from qtdog.objectives.base import DomainOutputs, ObjectiveSetting
from qtdog.objectives.pretrained import MIRO, MMS, class_margins, miro_penalty, mms_loss
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


def mms_by_hand(domains, weight, strength):
    """Class by class: S = cosine, margin 1 − S, both times the scale."""
    norms = np.linalg.norm(weight, axis=1)
    losses = []
    for domain in domains:
        for z, y in zip(domain.logits.numpy(), domain.labels.tolist(), strict=True):
            cosines = weight @ weight[y] / norms / norms[y]
            raised = [z[c] + strength * norms.mean() * (1 - cosines[c]) for c in range(len(z))]
            losses.append(np.log(np.sum(np.exp(raised))) - z[y])
    return np.mean(losses)


def setting_of(network: nn.Module) -> ObjectiveSetting:
    return ObjectiveSetting(3, 4, 5, 6, network)


@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(2))
def test_the_loss_is_its_formula(outputs, case, seed, strength):
    objective = MMS(setting_of(case.network), {"weight": strength}).double()
    weight = case.network.classifier.weight.detach().numpy()
    domains = outputs(seed)
    np.testing.assert_allclose(objective.loss(domains), mms_by_hand(domains, weight, strength), rtol=1e-9)


def test_with_text_embeddings_it_is_what_the_authors_code_does():
    generator = torch.Generator().manual_seed(0)
    texts, images = (normalize(torch.randn(n, 7, generator=generator, dtype=torch.float64)) for n in (4, 9))
    labels, scale = torch.randint(4, (9,), generator=generator), 100.0
    theirs = cross_entropy(scale * ((images - 0.3 * texts[labels]) @ texts.T), labels)
    logits = images @ (scale * texts).T
    ours = mms_loss([DomainOutputs(images, logits, labels)], 0.3 * class_margins(scale * texts))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_the_margins_stay_those_of_the_start(case):
    objective = MMS(setting_of(case.network), {})
    before = objective.margins.clone()
    with torch.no_grad():
        case.network.classifier.weight.add_(1.0)
    assert torch.equal(objective.margins, before)
    assert torch.equal(objective.state_dict()["margins"], before)
    assert torch.equal(before.diagonal(), torch.zeros(4, dtype=torch.float64))
    assert before.fill_diagonal_(1).min() > 0


def test_a_row_of_zeros_is_as_far_from_all():
    margins = class_margins(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]))
    torch.testing.assert_close(margins, 2 * (1 - torch.eye(3)))


@pytest.mark.parametrize("network", [nn.Identity(), nn.ModuleDict({"classifier": nn.ReLU()})])
def test_a_network_without_a_linear_classifier_is_refused(network):
    with pytest.raises(ConfigError, match=r"objective 'mms' .* linear classifier.*such as erm"):
        MMS(setting_of(network), {})
