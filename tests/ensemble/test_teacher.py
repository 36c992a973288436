"""A backbone as a teacher: its head, its input, what it keeps, and runs that learn from it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qtdog.core.config import ObjectiveConfig
from qtdog.core.errors import Interrupted, ModelError
from qtdog.core.progress import StopAfter
from qtdog.data.decoded_cache import cache_root
from qtdog.ensemble.teacher import (
    RIDGE,
    BackboneTeacher,
    Lens,
    build_backbone,
    fit_linear_head,
    load_backbone_teacher,
    load_teacher,
)
from qtdog.objectives.base import DomainBatch
from qtdog.objectives.wrappers import feature_distance
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
from qtdog.training.protocol import make_protocol, resolve
from qtdog.training.run import RunCallbacks, run

NAMED = {"teacher": "digits_cnn", "teacher_weights": "none", "teacher_image_size": 20}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QTDOG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(short_config, three_digits):
    def config(**objective):
        data = {"target": "75", "batch_size": 4, "image_size": 12}
        return resolve(short_config(data=data, objective=NAMED | objective), three_digits)

    return config


def test_the_head_is_where_the_gradient_vanishes():
    torch.manual_seed(0)
    features = 3 + torch.randn(200, 6) * torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0, 0.0])  # the last one never changes
    labels = (features[:, 0] > 3).long() + (features[:, 1] > 5).long()
    head = fit_linear_head(features, labels, 3)
    std = features.double().std(0, correction=0).clamp(min=0)
    std = torch.where(std > 1e-8, std, 1.0)
    weight = (head.weight.double() * std).requires_grad_()
    bias = head.bias.double() + head.weight.double() @ features.double().mean(0)
    x = (features.double() - features.double().mean(0)) / std
    loss = functional.cross_entropy(x @ weight.T + bias, labels) + RIDGE / 2 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-4
    assert (head(features).argmax(1) == labels).float().mean() > 0.7


def test_an_image_is_shown_as_the_teacher_takes_it():
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 16, 16)
    student = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    mean, std = (torch.tensor(values)[:, None, None] for values in student)
    lens = Lens(16, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    own = torch.tensor(lens.mean)[:, None, None], torch.tensor(lens.std)[:, None, None]
    torch.testing.assert_close(lens.of((pixels - mean) / std, *student), (pixels - own[0]) / own[1])
    larger = Lens(24, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).of((pixels - mean) / std, *student)
    expected = functional.interpolate(pixels, size=(24, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(larger, expected, rtol=0, atol=1e-5)


def test_distances_are_their_formulas():
    torch.manual_seed(0)
    one, other = torch.randn(5, 7), torch.randn(5, 7)
    cosine = 1 - (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
    torch.testing.assert_close(feature_distance(one, other, "cosine"), cosine.mean())
    torch.testing.assert_close(feature_distance(one, other, "l2"), (one - other).square().sum(1).div(7).mean())


def test_the_target_is_never_shown_and_features_are_kept(make, three_digits):
    config = make(teacher_view="clean")
    teacher = load_backbone_teacher(config, three_digits)
    assert teacher.clean is not None
    known = ~teacher.clean.isnan().any(1)
    assert not known[torch.from_numpy(three_digits.indices("75"))].any()
    assert known.sum() == sum(len(three_digits.indices(d)) for d in make_protocol(config, three_digits).sources)
    kept = sorted((cache_root() / "teachers").iterdir())
    assert len(kept) == 2
    times = [(folder / "features.safetensors").stat().st_mtime_ns for folder in kept]
    again = load_backbone_teacher(config, three_digits)
    assert again.clean is not None
    assert torch.equal(again.clean.nan_to_num(), teacher.clean.nan_to_num())
    assert torch.equal(again.head.weight, teacher.head.weight)
    assert [(folder / "features.safetensors").stat().st_mtime_ns for folder in kept] == times
    batch = build_components(config, three_digits, teacher=teacher).batches.batch(0)
    moved = DomainBatch(batch.images, batch.labels, batch.sizes, 0, (), batch.indices)
    assert torch.equal(teacher.features(moved), teacher.clean[batch.indices])


def test_both_views_of_an_image_without_augmentation_are_nearly_one(short_config, three_digits):
    data = {"target": "75", "batch_size": 4, "image_size": 28, "augment": "none"}
    objective = NAMED | {"teacher_image_size": 28}
    configs = [
        resolve(short_config(data=data, objective=objective | {"teacher_view": view}), three_digits)
        for view in ("same", "clean")
    ]
    same, clean = (load_backbone_teacher(config, three_digits) for config in configs)
    batch = build_components(configs[0], three_digits, teacher=same).batches.batch(0)
    moved = DomainBatch(batch.images, batch.labels, batch.sizes, 0, (), batch.indices)
    torch.testing.assert_close(same.logits(moved), clean.logits(moved), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mode", "view"), [("logits", "same"), ("cosine", "clean"), ("l2", "same")])
def test_a_run_that_learns_from_a_backbone_resumes_bit_for_bit(make, three_digits, tmp_path, mode, view):
    config = make(teacher_mode=mode, teacher_view=view)
    teacher = load_teacher(config, three_digits)
    assert isinstance(teacher, BackboneTeacher)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    expected = run(config, three_digits, whole, teacher=teacher)
    with pytest.raises(Interrupted):
        run(config, three_digits, broken, teacher=teacher, callbacks=RunCallbacks(StopAfter(2)))
    again = load_teacher(config, three_digits)
    assert run(config, three_digits, broken, teacher=again, resume=True)["model_sha256"] == expected["model_sha256"]


def test_torchvisions_models_teach_too():
    how = ObjectiveConfig(teacher="torchvision/resnet18", teacher_weights="none", teacher_image_size=64)
    network, lens = build_backbone(how, 3)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 512)
    assert lens == Lens(64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(ModelError, match="no model 'resnet19'"):
        build_backbone(how.model_copy(update={"teacher": "torchvision/resnet19"}), 3)
