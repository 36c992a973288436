from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from qtdog.core.errors import ConfigError, Interrupted
from qtdog.core.progress import StopAfter
from qtdog.objectives.base import OBJECTIVES, DomainBatch, ObjectiveSetting
from qtdog.objectives.wrappers import Consistency, jensen_shannon
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components
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
