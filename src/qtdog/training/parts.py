"""The objects that one run is made of, as the loop takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from qtdog.conversion.attach import Attached
from qtdog.core.config import Config
from qtdog.data.loader import TrainBatches
from qtdog.models.network import Network
from qtdog.objectives.base import ModelView, Objective
from qtdog.runs.record import Record
from qtdog.training.averagers import Averager
from qtdog.training.shared_batch import of_all_processes
from qtdog.training.step_rules import StepRule


class Trainable(nn.Module):
    """The network as training calls it: features and logits in one forward, so that several processes stay in step."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return features (n, d) and logits (n, n_classes) of images (n, C, H, W); see `Network.features`."""
        features = self.network.features(images, sizes)
        return features, self.network.classifier(features)


@dataclass(frozen=True)
class Parts:
    """What the loop runs.

    Attributes:
        config: the effective configuration.
        accelerator: device, precision and processes.
        network: the plain network, for evaluation and state.
        model: the same, prepared for training: images → (features, logits).
        optimizer: holds every parameter from step 0 to the end.
        quantizer: the attached quantizers, or None for a float run.
        batches: batch of a step, a pure function of the step.
        objective, step_rule, averager: the axes.
        base_lrs: learning rate of each group of the optimizer, before any schedule.
        evaluate: (step, selectable, train_loss, check) → record.
    """

    config: Config
    accelerator: Accelerator
    network: Network
    model: nn.Module
    optimizer: Optimizer
    quantizer: Attached | None
    batches: TrainBatches
    objective: Objective
    step_rule: StepRule
    averager: Averager
    base_lrs: tuple[float, ...]
    evaluate: Callable[[int, bool, float | None, Callable[[], None]], Record]

    @property
    def selectable(self) -> bool:
        """Whether a checkpoint taken now may be shipped: a quantized run ships only quantized ones."""
        return self.config.start_step is None or self.quantizer is None or self.quantizer.shippable

    @property
    def view(self) -> ModelView:
        """The model as an objective sees it."""
        return ModelView(self.model, self.network, partial(of_all_processes, self.accelerator))
