"""A teacher, smoothed labels and consistent views around another objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from qtdog.core.errors import ConfigError, Interrupted
from qtdog.core.progress import StopAfter
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ModelView, ObjectiveSetting
from qtdog.objectives.perturbation import Mixup
from qtdog.objectives.risks import ERM, erm_loss
from qtdog.objectives.wrappers import (
    BatchTeacher,
    Consistency,
    Distill,
    FeatureDistill,
    LabelSmoothing,
    distillation_loss,
    jensen_shannon,
)
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.loop import update
from qtdog.training.protocol import resolve
from qtdog.training.run import RunCallbacks, run


def test_the_divergence_is_that_of_the_authors_code():
    torch.manual_seed(0)
    logits = [3 * torch.randn(6, 5) for _ in range(3)]
    clean, one, two = (functional.softmax(part, dim=1) for part in logits)
    mixture = torch.clamp((clean + one + two) / 3.0, 1e-7, 1).log()
    kls = [functional.kl_div(mixture, part, reduction="batchmean") for part in (clean, one, two)]
    torch.testing.assert_close(jensen_shannon(logits), sum(kls, torch.tensor(0.0)) / 3.0)


def test_it_is_the_loss_of_the_clean_images_and_the_divergence_of_all(case):
    torch.manual_seed(1)
    views = tuple(case.batch.images + torch.randn_like(case.batch.images) for _ in range(2))
    batch = DomainBatch(case.batch.images, case.batch.labels, case.batch.sizes, 0, views)
    erm = OBJECTIVES["erm"](ObjectiveSetting(3, 4, 5, 6, nn.Identity()), {})
    found = Consistency(erm, 12.0)(case.view, batch)
    logits = [case.network(images) for images in (batch.images, *views)]
    expected = functional.cross_entropy(logits[0], batch.labels) + 12.0 * jensen_shannon(logits)
    torch.testing.assert_close(found.float(), expected.float())
    with pytest.raises(ValueError, match="2 views of each image"):
        Consistency(erm, 12.0)(case.view, case.batch)


def test_it_needs_augmix_and_an_objective_of_outputs(short_config, digits):
    with pytest.raises(ConfigError, match=r"set data\.augment=augmix"):
        build_components(resolve(short_config(objective={"consistency": 12.0}), digits), digits)
    config = short_config(objective={"name": "vrex", "consistency": 12.0}, data={"augment": "augmix"})
    with pytest.raises(ConfigError, match="'VREx' runs the model itself"):
        build_components(resolve(config, digits), digits)


def test_a_run_with_views_stops_and_resumes_bit_for_bit(tmp_path, short_config, digits):
    config = resolve(short_config(objective={"consistency": 12.0}, data={"augment": "augmix"}), digits)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    expected = run(config, digits, whole)
    with pytest.raises(Interrupted):
        run(config, digits, broken, callbacks=RunCallbacks(StopAfter(2)))
    assert run(config, digits, broken, resume=True)["model_sha256"] == expected["model_sha256"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.featurizer = nn.Flatten()
        self.classifier = nn.Linear(12, 4)

    def forward(self, images):
        features = self.featurizer(images)
        return features, self.classifier(features)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_formula(temperature):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(6, 4), 3 * torch.randn(6, 4)
    p, q = (softmax(z.double().numpy() / temperature) for z in (teacher, student))
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def setting(n_domains=2):
    return ObjectiveSetting(n_domains=n_domains, n_classes=4, n_features=12, batch_size=3, network=Net())


def test_labels_and_teacher_are_weighted_and_only_the_student_gets_a_gradient():
    torch.manual_seed(0)
    student, teacher = Net(), Net()
    batch = DomainBatch(torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1]), (3, 3))
    view = ModelView(student, student)
    seen = []

    def answer(images):
        seen.append(images)
        return teacher(images)[1]

    loss = Distill(ERM(setting(), {}), answer, weight=0.7, temperature=2.0)(view, batch)
    soft = distillation_loss(student(batch.images)[1], teacher(batch.images)[1], 2.0)
    assert loss.item() == pytest.approx((0.7 * soft + 0.3 * erm_loss(view.outputs(batch))).item(), rel=1e-5)
    assert torch.equal(seen[0], batch.images)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.classifier.weight.grad is not None


def test_an_objective_that_runs_the_model_itself_is_refused():
    with pytest.raises(ConfigError, match="'Mixup' runs the model itself"):
        Distill(Mixup(setting(), {}), lambda images: images, weight=0.5, temperature=1.0)


def test_the_features_weigh_as_asked(case):
    class Ones(BatchTeacher):
        def __init__(self):
            self.n_features = 3

        def features(self, batch):
            return torch.ones(len(batch.images), 3)

        def logits(self, batch):
            raise NotImplementedError

    setting = ObjectiveSetting(3, 4, 5, 6, nn.Identity())
    erm = ERM(setting, {})
    distill = FeatureDistill(erm, Ones(), weight=0.25, kind="l2", setting=setting)
    found = distill(case.view, case.batch)
    features = case.network.featurizer(case.batch.images).float()
    distance = (distill.adapter(features) - 1).square().mean()
    torch.testing.assert_close(found.float(), 0.25 * distance + 0.75 * erm(case.view, case.batch).float())
    assert {"adapter.weight", "adapter.bias"} == {name for name, _ in distill.named_parameters()}
    several = ObjectiveSetting(3, 4, 5, 6, nn.Identity(), n_processes=2)
    with pytest.raises(ConfigError, match="one process only"):
        FeatureDistill(erm, Ones(), weight=0.25, kind="l2", setting=several)


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("name", ["erm", "coral", "deep-coral", "mmd"])
def test_the_cross_entropy_is_torchs_with_label_smoothing(objective, outputs, name, share):
    """Without its penalty an objective is the mean over images (erm) or over domains; these are of unequal sizes."""
    made = objective(name, **({} if name == "erm" else {"weight": 0.1}))
    domains = outputs()
    smooth = [functional.cross_entropy(one.logits, one.labels, label_smoothing=share) for one in domains]
    hard = [functional.cross_entropy(one.logits, one.labels) for one in domains]
    if name == "erm":
        sizes = torch.tensor([len(one.labels) for one in domains], dtype=torch.float64)
        grown = ((torch.stack(smooth) - torch.stack(hard)) * sizes).sum() / sizes.sum()
    else:
        grown = torch.stack(smooth).mean() - torch.stack(hard).mean()
    found = LabelSmoothing(made, share).loss(domains) - made.loss(domains)
    torch.testing.assert_close(found, grown)


@pytest.mark.parametrize("name", ["vrex", "groupdro", "mixup"])
def test_other_losses_are_refused(objective, name):
    with pytest.raises(ConfigError, match="labels cannot be smoothed"):
        LabelSmoothing(objective(name), 0.1)


def test_no_objective_says_so_wrongly():
    assert {name for name in OBJECTIVES if OBJECTIVES[name].MEAN_CROSS_ENTROPY} == {"erm", "coral", "deep-coral", "mmd"}


def test_it_stands_in_the_loop_and_beside_a_teacher(short_config, digits, case):
    config = resolve(short_config(objective={"label_smoothing": 0.1}), digits)
    parts, plain = (build_components(one, digits) for one in (config, resolve(short_config(), digits)))
    batch = parts.batches.batch(0)
    assert update(parts, batch, 0) != update(plain, batch, 0)
    smooth = LabelSmoothing(OBJECTIVES["erm"](ObjectiveSetting(3, 4, 5, 6, nn.Identity()), {}), 0.1)
    taught = Distill(smooth, lambda images: torch.zeros(len(images), 4), weight=0.0, temperature=1.0)
    torch.testing.assert_close(taught(case.view, case.batch), smooth(case.view, case.batch))
