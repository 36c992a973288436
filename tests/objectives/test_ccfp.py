import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from qtdog.core.errors import ConfigError
from qtdog.core.feature_maps import Stage
from qtdog.objectives.base import ObjectiveSetting
from qtdog.objectives.ccfp import CCFP, StyleShifts, consistency, domain_discrepancy, gram, reaching_only

STAGES = [Stage("a", 3, axis=1, ndim=4), Stage("b", 5, axis=3, ndim=4), Stage("c", 4, axis=2, ndim=3)]
SHAPES = [(6, 3, 4, 4), (6, 2, 3, 5), (6, 7, 4)]
EPS = 1e-6


def draw(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def gram_in_numpy(features: torch.Tensor, stage: Stage) -> np.ndarray:
    grams = []
    for image in np.moveaxis(features.numpy(), stage.axis, 1):
        flat = image.reshape(stage.n_channels, -1)
        grams.append(flat @ flat.T / flat.size)
    return np.stack(grams)


@pytest.mark.parametrize("index", range(3))
def test_the_gram_matrix_of_every_layout(index: int):
    features = draw(0)[index]
    np.testing.assert_allclose(gram(features, STAGES[index]).numpy(), gram_in_numpy(features, STAGES[index]))


def test_the_discrepancy_is_the_norm_between_gram_matrices():
    ours, theirs = draw(0), draw(1)
    expected = sum(
        np.sqrt(((gram_in_numpy(f, stage) - gram_in_numpy(g, stage)) ** 2).sum())
        for f, g, stage in zip(ours, theirs, STAGES, strict=True)
    )
    assert domain_discrepancy(ours, theirs, STAGES).item() == pytest.approx(expected, rel=1e-12)


def test_each_stream_is_drawn_to_the_other():
    one, other = (features.requires_grad_() for features in (draw(0)[2], draw(1)[2]))
    loss = consistency(one, other)
    assert loss.item() == pytest.approx(2 * ((one - other) ** 2).mean().item(), rel=1e-12)
    grads = torch.autograd.grad(loss, [one, other])
    torch.testing.assert_close(grads[0], 2 * (one - other).detach() / one.numel())
    torch.testing.assert_close(grads[1], -grads[0])


@pytest.mark.parametrize("index", range(3))
def test_a_shift_moves_mean_and_deviation_of_its_channel(index: int):
    stage, features = STAGES[index], draw(0)[index]
    shifts = StyleShifts(STAGES).double()
    assert torch.equal(shifts(stage, features), features)
    with torch.no_grad():
        shifts.means[index].copy_(torch.linspace(-1, 1, stage.n_channels))
        shifts.stds[index].copy_(torch.linspace(0, 2, stage.n_channels))
    x = np.moveaxis(features.numpy(), stage.axis, -1)
    axes = tuple(range(1, x.ndim - 1))
    mean, std = x.mean(axes, keepdims=True), np.sqrt(x.var(axes, keepdims=True) + EPS)
    beta, gamma = (values[index].detach().numpy() for values in (shifts.means, shifts.stds))
    expected = (x - mean) / std * (std + gamma) + mean + beta
    found = np.moveaxis(shifts(stage, features).detach().numpy(), stage.axis, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_a_gradient_reaches_only_what_it_should():
    a, b, c = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, 3.0, 5.0))
    value = a * b**2 * c
    found = reaching_only(value, [a, c])
    assert found.item() == 90.0
    grads = torch.autograd.grad(found + b, [a, b, c])
    assert [grad.item() for grad in grads] == [45.0, 1.0, 18.0]


def moved(staged, **params: float) -> CCFP:
    """An objective after some training: shifts and the second network are no longer as they started."""
    objective = staged.objective("ccfp", **params)
    assert isinstance(objective, CCFP)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return objective


def terms(staged, objective: CCFP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Classification, consistency and discrepancy, layer by layer."""
    images, labels = staged.batch.images, staged.batch.labels
    logits, maps = staged.network(images), staged.stage_maps(staged.network, images)
    values, shifted = images, []
    stages = {stage.name: stage for stage in objective.stages}
    for name, layer in objective.perturbed.get_submodule("featurizer").named_children():
        values = layer(values)
        if f"featurizer.{name}" in stages:
            values = objective.shifts(stages[f"featurizer.{name}"], values)
            shifted.append(values)
    perturbed = objective.perturbed.get_submodule("classifier")(values)
    discrepancy = domain_discrepancy([found.detach() for found in maps[:3]], shifted, objective.stages)
    classified = cross_entropy(logits, labels) + cross_entropy(perturbed, labels)
    return classified, consistency(logits, perturbed), discrepancy


def test_the_loss_has_its_terms_and_all_stages_but_the_last(staged):
    objective = moved(staged, consistency_weight=0.7, discrepancy_weight=0.3)
    assert [stage.name for stage in objective.stages] == ["featurizer.2", "featurizer.5", "featurizer.8"]
    classified, agreed, discrepancy = terms(staged, objective)
    torch.testing.assert_close(staged.loss(objective), classified + 0.7 * agreed - 0.3 * discrepancy)


def test_the_discrepancy_trains_the_shifts_alone(staged):
    objective = moved(staged, discrepancy_weight=0.3)
    networks = [*staged.network.parameters(), *objective.perturbed.parameters()]
    shifts = list(objective.shifts.parameters())
    classified, agreed, discrepancy = terms(staged, objective)
    expected = torch.autograd.grad(classified + agreed, networks, retain_graph=True)
    expected_shifts = torch.autograd.grad(classified + agreed - 0.3 * discrepancy, shifts)
    found = torch.autograd.grad(staged.loss(objective), networks + shifts)
    for one, other in zip(found, (*expected, *expected_shifts), strict=True):
        torch.testing.assert_close(one, other)


def test_training_the_shifts_increases_the_discrepancy(staged):
    objective = moved(staged, discrepancy_weight=10.0)
    before = terms(staged, objective)[2].item()
    optimizer = torch.optim.SGD(objective.shifts.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        staged.loss(objective).backward()
        optimizer.step()
    assert terms(staged, objective)[2].item() > before


def test_the_second_network_has_the_same_backbone_and_a_head_of_its_own(staged):
    objective = staged.objective("ccfp")
    ours, theirs = staged.network.state_dict(), objective.perturbed.state_dict()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    again = staged.objective("ccfp").perturbed.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in theirs.items())
    staged.loss(objective).backward()  # at the start both streams look alike, where a norm has no slope
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_one_stage_is_too_few(staged):
    setting = ObjectiveSetting(3, 4, 32, 6, staged.network, stages=lambda: staged.setting.stages()[:1])
    with pytest.raises(ConfigError, match="one stage only"):
        CCFP(setting, {})
