"""Margin metric softmax against its formula, and against the form of the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import DomainOutputs, ObjectiveSetting
from qtdog.objectives.mms import MMS, class_margins, mms_loss


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
