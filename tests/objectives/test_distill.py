import numpy as np
import pytest
import torch
from torch import nn

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import DomainBatch, ModelView, ObjectiveSetting
from qtdog.objectives.distill import BatchTeacher, Distill, FeatureDistill, distillation_loss
from qtdog.objectives.erm import ERM, erm_loss
from qtdog.objectives.mixup import Mixup


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
