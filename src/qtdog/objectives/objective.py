"""What an objective is: the loss of one step, which knows nothing of optimizer, device or loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from qtdog.core.errors import ConfigError
from qtdog.core.hyperparameters import HyperParameters, Value, fill
from qtdog.core.registry import Registry
from qtdog.objectives.view import DomainBatch, DomainOutputs, ModelView


@dataclass(frozen=True)
class Setting:
    """What an objective may need to know before training.

    Attributes:
        n_domains: source domains.
        n_classes: classes.
        n_features: d, the width of the penultimate features.
        batch_size: images per source domain and step.
        network: the network as it starts, before quantizers are attached: `featurizer` and `classifier`.
    """

    n_domains: int
    n_classes: int
    n_features: int
    batch_size: int
    network: nn.Module


class Objective(nn.Module, ABC):
    """The loss of one step; abstract.

    Most members are pure: they define `loss` over the outputs of each domain. One that must see images or run the model
    itself overrides `forward`. State goes into buffers (it is saved in checkpoints and never shipped), further networks
    into submodules: their parameters train with the run's optimizer, at `lr_factor` times the learning rate.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        MIN_DOMAINS: fewest source domains that make sense.
        MIN_BATCH: fewest images per domain and step.
        lr_factor: of the objective's own parameters.
        params: the values of the hyper-parameters.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    MIN_DOMAINS: ClassVar[int] = 1
    MIN_BATCH: ClassVar[int] = 1
    lr_factor: float = 1.0

    def __init__(self, setting: Setting, params: Mapping[str, Value]) -> None:
        super().__init__()
        name = type(self).__name__
        self.params = fill(f"objective '{name}'", self.HYPERPARAMETERS, params)
        if setting.n_domains < self.MIN_DOMAINS:
            text = f"objective '{name}' compares domains and needs at least {self.MIN_DOMAINS} source domains"
            raise ConfigError(f"{text}, found {setting.n_domains}. Add one, or use another objective, such as erm.")
        if setting.batch_size < self.MIN_BATCH:
            text = f"objective '{name}' needs at least {self.MIN_BATCH} images per domain and step"
            raise ConfigError(f"{text}, data.batch_size is {setting.batch_size}: use --batch-size {self.MIN_BATCH}.")

    def number(self, name: str) -> float:
        """Return the value of a numeric hyper-parameter."""
        return float(self.params[name])

    @abstractmethod
    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss of the outputs of all source domains."""

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        return self.loss(view.outputs(batch))


OBJECTIVES: Registry[type[Objective]] = Registry("objective")
