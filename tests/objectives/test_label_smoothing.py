from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from qtdog.core.errors import ConfigError
from qtdog.objectives.base import OBJECTIVES, ObjectiveSetting
from qtdog.objectives.distill import Distill
from qtdog.objectives.wrappers import LabelSmoothing
from qtdog.training.build import build_components
from qtdog.training.loop import update
from qtdog.training.protocol import resolve


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
