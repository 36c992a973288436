"""What an objective is: the loss of one step, which knows nothing of optimizer, device or loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qtdog.core.errors import ConfigError
from qtdog.core.feature_maps import Stage
from qtdog.core.registry import HyperParameters, Registry, Value, fill
from qtdog.objectives.view import DomainBatch, DomainOutputs, ModelView


@dataclass(frozen=True)
class Setting:
    """What an objective may need to know before training.

    Attributes:
        n_domains: source domains.
        n_classes: classes.
        n_features: d, the width of the penultimate features.
        batch_size: images per source domain and step, over all processes.
        network: the network as it starts, before quantizers are attached: `featurizer` and `classifier`.
        n_processes: processes that share the batch.
        seed: of the random start of an objective's own networks.
        stages: finds the stages of the network, first to last; raises ModelError where it has none.
        equal_shares: whether every domain has as many images in a batch.
    """

    n_domains: int
    n_classes: int
    n_features: int
    batch_size: int
    network: nn.Module
    n_processes: int = 1
    seed: int = 0
    stages: Callable[[], Sequence[Stage]] = tuple
    equal_shares: bool = True


class Objective(nn.Module):
    """The loss of one step; abstract.

    Most members are pure: they define `loss` over the outputs of each domain. One that must see images or the step, or
    run the model itself, overrides `forward` instead. State goes into buffers (it is saved in checkpoints and never
    shipped), further networks into submodules: their parameters train with the run's optimizer, at `lr_factor` times
    the learning rate.

    Raises:
        ConfigError: an unknown hyper-parameter or value, too few source domains, too small a batch, unequal shares of
            it where they must be equal, or several processes where one is needed.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        MIN_DOMAINS: fewest source domains that make sense.
        MIN_BATCH: fewest images per domain and step.
        EQUAL_SHARES: whether every domain must have as many images in a batch.
        ONE_PROCESS: whether it cannot be shared by several processes: it runs the plain network itself, whose gradients
            nobody gathers, or has parameters of its own.
        lr_factor: of the objective's own parameters.
        params: the values of the hyper-parameters.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    MIN_DOMAINS: ClassVar[int] = 1
    MIN_BATCH: ClassVar[int] = 1
    EQUAL_SHARES: ClassVar[bool] = False
    ONE_PROCESS: ClassVar[bool] = False
    lr_factor: float = 1.0

    def __init__(self, setting: Setting, params: Mapping[str, Value]) -> None:
        super().__init__()
        name = next((name for name in OBJECTIVES if OBJECTIVES[name] is type(self)), type(self).__name__)
        self.params = fill(f"objective '{name}'", self.HYPERPARAMETERS, params)
        self._seen_step: int | None = None
        if setting.n_domains < self.MIN_DOMAINS:
            text = f"objective '{name}' compares domains and needs at least {self.MIN_DOMAINS} source domains"
            raise ConfigError(f"{text}, found {setting.n_domains}. Add one, or use another objective, such as erm.")
        if self.ONE_PROCESS and setting.n_processes > 1:
            text = f"objective '{name}' works in one process only, and there are {setting.n_processes}"
            raise ConfigError(f"{text}. Start it without `accelerate launch`, or with --num_processes 1.")
        if setting.batch_size < self.MIN_BATCH:
            text = f"objective '{name}' needs at least {self.MIN_BATCH} images per domain and step"
            raise ConfigError(f"{text}, data.batch_size is {setting.batch_size}: use --batch-size {self.MIN_BATCH}.")
        if self.EQUAL_SHARES and not setting.equal_shares:
            text = f"objective '{name}' takes as many images of every domain, and data.focus gives one of them half"
            raise ConfigError(f"{text}. Leave data.focus out, or use another objective, such as erm.")

    def number(self, name: str) -> float:
        """Return the value of a numeric hyper-parameter."""
        return float(self.params[name])

    def new_step(self, batch: DomainBatch) -> bool:
        """Return whether this is the first pass over the batch of a step.

        A step rule may make several (SAM makes two); what an objective remembers moves once per step.
        """
        is_new = batch.step != self._seen_step
        self._seen_step = batch.step
        return is_new

    @torch.no_grad()
    def remember_(self, buffer: Tensor, value: Tensor) -> None:
        """Copy `value` into `buffer`, unless it is not finite: the run then stops, and its last good state is kept."""
        buffer.copy_(torch.where(value.isfinite().all(), value, buffer))

    def loss(self, domains: Sequence[DomainOutputs]) -> Tensor:
        """Return the scalar loss of the outputs of all source domains.

        Raises:
            NotImplementedError: the member overrides `forward` instead.
        """
        raise NotImplementedError(f"{type(self).__name__} is a loss of more than outputs: call it as a module")

    def forward(self, view: ModelView, batch: DomainBatch) -> Tensor:
        """Return the scalar loss of one step."""
        return self.loss(view.outputs(batch))


OBJECTIVES: Registry[type[Objective]] = Registry("objective")
