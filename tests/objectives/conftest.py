"""Small domains, networks and objectives in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from qtdog.core.registry import import_members
from qtdog.models.network import Network
from qtdog.objectives.objective import OBJECTIVES, Objective, Setting
from qtdog.objectives.view import DomainBatch, DomainOutputs, ModelView
from qtdog.training.parts import Trainable

import_members("qtdog.objectives")

N_DOMAINS, N, N_FEATURES, N_CLASSES = 3, 6, 5, 4


class Case(NamedTuple):
    """A network in float64 with one batch of 2 × 3 images for it."""

    network: Network
    view: ModelView
    batch: DomainBatch

    def at(self, step: int) -> DomainBatch:
        return DomainBatch(self.batch.images, self.batch.labels, self.batch.sizes, step)


@pytest.fixture
def outputs() -> Callable[[int], list[DomainOutputs]]:
    """Return a function that makes the outputs of three unequal domains."""

    def make(seed: int = 0) -> list[DomainOutputs]:
        generator = torch.Generator().manual_seed(seed)
        domains = []
        for d in range(N_DOMAINS):
            features = d + (1 + d) * torch.randn(N + d, N_FEATURES, generator=generator, dtype=torch.float64)
            logits = 2 * torch.randn(N + d, N_CLASSES, generator=generator, dtype=torch.float64)
            labels = torch.randint(N_CLASSES, (N + d,), generator=generator)
            domains.append(DomainOutputs(features, logits, labels))
        return domains

    return make


def make_setting(n_domains: int = N_DOMAINS, batch_size: int = N, n_processes: int = 1) -> Setting:
    return Setting(n_domains, N_CLASSES, N_FEATURES, batch_size, nn.Identity(), n_processes)


@pytest.fixture
def setting() -> Callable[..., Setting]:
    """Return a function that says what an objective is for."""
    return make_setting


@pytest.fixture
def objective() -> Callable[..., Objective]:
    """Return a function that makes an objective by name, in float64."""

    def make(name: str, **params: float) -> Objective:
        return OBJECTIVES[name](make_setting(), params).double()

    return make


@pytest.fixture
def case() -> Case:
    """Make a network of two layers and a batch of three domains."""
    torch.manual_seed(0)
    featurizer = nn.Sequential(nn.Flatten(), nn.Linear(6, N_FEATURES), nn.Tanh())
    network = Network(featurizer, nn.Linear(N_FEATURES, N_CLASSES), freeze_bn=True).double()
    images = torch.randn(N_DOMAINS * N, 1, 2, 3, dtype=torch.float64)
    labels = torch.randint(N_CLASSES, (N_DOMAINS * N,))
    return Case(network, ModelView(Trainable(network), network), DomainBatch(images, labels, (N,) * N_DOMAINS))
