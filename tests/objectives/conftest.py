"""Small domains, networks and objectives in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn

from qtdog.models.backbones import create_network
from qtdog.models.feature_layers import find_stages
from qtdog.models.network import Network
from qtdog.objectives.base import OBJECTIVES, DomainBatch, DomainOutputs, ModelView, Objective, ObjectiveSetting
from qtdog.training.components import Trainable

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


def make_setting(n_domains: int = N_DOMAINS, batch_size: int = N, n_processes: int = 1) -> ObjectiveSetting:
    return ObjectiveSetting(n_domains, N_CLASSES, N_FEATURES, batch_size, nn.Identity(), n_processes)


@pytest.fixture
def setting() -> Callable[..., ObjectiveSetting]:
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


@dataclass(frozen=True)
class Staged:
    """A network with stages in float64, what an objective is told of it, and one batch of 3 × 6 images for it."""

    network: Network
    setting: ObjectiveSetting
    view: ModelView
    batch: DomainBatch

    def objective(self, name: str, **params: float | str) -> Objective:
        return OBJECTIVES[name](self.setting, params).double()

    def loss(self, objective: Objective, seed: int = 0) -> torch.Tensor:
        torch.manual_seed(seed)
        return objective(self.view, self.batch)

    def stage_maps(self, network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        """The maps behind each group norm of digits_cnn, layer by layer."""
        maps = []
        for layer in network.get_submodule("featurizer").children():
            images = layer(images)
            if isinstance(layer, nn.GroupNorm):
                maps.append(images)
        return maps


@pytest.fixture
def staged() -> Staged:
    """Make the network for digits and a batch of three domains."""
    options = {"n_classes": N_CLASSES, "channels": 1, "image_size": 8, "weights": "none", "freeze_bn": True}
    network = create_network("digits_cnn", seed=0, **options).double()
    stages = partial(find_stages, network, (1, 8, 8))
    setting = ObjectiveSetting(N_DOMAINS, N_CLASSES, network.classifier.in_features, N, network, seed=3, stages=stages)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(N_DOMAINS * N, 1, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(N_CLASSES, (N_DOMAINS * N,), generator=generator)
    batch = DomainBatch(images, labels, (N,) * N_DOMAINS)
    return Staged(network, setting, ModelView(Trainable(network), network), batch)
