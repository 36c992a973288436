"""What a run is made of (`Components`) and where it stands (`RunState`), as the loop takes them."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from qtdog.conversion.attach import Attached, sites
from qtdog.core.config import Config
from qtdog.core.errors import ModelError
from qtdog.data.dataset import DomainDataset
from qtdog.data.loader import TrainBatches
from qtdog.models.network import Network
from qtdog.objectives.base import ModelView, Objective
from qtdog.quantizers.lsq_groups import WeightGroups
from qtdog.runs.record import Record
from qtdog.training.averagers import Averager
from qtdog.training.evaluation import EvaluationInputs, Evaluator
from qtdog.training.loss_scale import LossScale
from qtdog.training.protocol import DomainProtocol
from qtdog.training.step_rules import StepRule

LOSS_SCALE = "loss_scale"
"""Name of the scale among the modules of an objective."""


def of_all_processes(accelerator: Accelerator, rows: Tensor) -> Sequence[Tensor]:
    """Return the rows of every process, in their order; gradients flow into this process's own.

    Every process then computes the same loss, and the gradient of a parameter is the sum of what each finds through its
    own rows. Processes take the mean of their gradients, so that each is multiplied by their number.

    Args:
        accelerator: knows the processes.
        rows: shape (n, …), with the same n in all processes.

    Example:
        >>> import torch
        >>> of_all_processes(Accelerator(cpu=True), torch.ones(2))
        [tensor([1., 1.])]
    """
    n = accelerator.num_processes
    if n == 1:
        return [rows]
    gathered = accelerator.gather(rows.detach())
    assert isinstance(gathered, Tensor)
    parts = list(gathered.chunk(n))
    if rows.requires_grad:
        own = rows.view_as(rows)  # a node of its own: `rows` may be read elsewhere too
        own.register_hook(lambda gradient: gradient * n)
        parts[accelerator.process_index] = own
    return parts


class Trainable(nn.Module):
    """The network as training calls it: features and logits in one forward, so that several processes stay in step.

    Layers with LSQ are quantized in groups meanwhile, and a weight that several modules share, or that is read twice,
    once. A compiled pass has its quantizers inside one graph in place of that.

    Args:
        network: quantizers attached.
        backend: of torch.compile, or "off".
        use_float16: autocast to float16; what is returned is float32.
    """

    def __init__(self, network: Network, backend: str = "off", *, use_float16: bool = False) -> None:
        super().__init__()
        self.network = network
        self.use_float16 = use_float16
        self.groups = WeightGroups(network)
        self.compiled = None if backend == "off" else compiled_pass(network, backend)

    def forward(self, images: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return features (n, d) and logits (n, n_classes) of images (n, C, H, W); see `Network.features`.

        Raises:
            ModelError: torch.compile cannot make one graph of the pass.
        """
        if self.use_float16:
            with torch.autocast(images.device.type, torch.float16):
                features, logits = self._pass(images, sizes)
            return features.float(), logits.float()
        return self._pass(images, sizes)

    def _pass(self, images: Tensor, sizes: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        if self.compiled is not None:
            return self.compiled(images, sizes)
        with parametrize.cached(), self.groups:
            return features_and_logits(self.network, images, sizes)


def features_and_logits(network: Network, images: Tensor, sizes: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Return features and logits of images."""
    features = network.features(images, sizes)
    return features, network.classifier(features)


def compiled_pass(network: Network, backend: str) -> Callable[[Tensor, Sequence[int] | None], tuple[Tensor, Tensor]]:
    """Return `features_and_logits` of a network as one graph; it is made at the first call, and anew at the start step.

    Args:
        network: quantizers attached.
        backend: of torch.compile.
    """
    from torch._dynamo.exc import TorchDynamoException  # most of a second to import

    def run(images: Tensor, sizes: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        return features_and_logits(network, images, sizes)

    # torch keeps graphs by the code of a function, eight at most, and a process may train many networks
    own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    graph = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
    quantizers = [site.quantizer for site in sites(network)]

    def call(images: Tensor, sizes: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        for quantizer in quantizers:
            quantizer.read_()  # a graph cannot, and has what was read last
        try:
            return graph(images, sizes)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"torch.compile cannot make one graph of this network ({reason}): leave out train.compile"
            ) from error

    return call


@dataclass(frozen=True)
class Components:
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
        dataset: the data set.
        protocol: the roles of its domains and images.
        inputs: its images as evaluation takes them.
        evaluate: (step, selectable, train_loss, check_interrupt) → record.
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
    dataset: DomainDataset
    protocol: DomainProtocol
    inputs: EvaluationInputs
    evaluate: Evaluator

    @property
    def selectable(self) -> bool:
        """Whether a checkpoint taken now may be saved: a quantized run saves only quantized ones."""
        return self.start_step is None or self.quantizer is None or self.quantizer.selectable

    @cached_property
    def start_step(self) -> int | None:
        """The step at which quantization begins; None for never."""
        return self.config.start_step

    @cached_property
    def decay_from(self) -> int:
        """The step from which a schedule lets the learning rate fall."""
        return self.config.decay_from

    @property
    def loss_scale(self) -> LossScale | None:
        """The scale of the losses; None but under float16."""
        found = getattr(self.objective, LOSS_SCALE, None)
        return found if isinstance(found, LossScale) else None

    def scaled(self, loss: Tensor) -> Tensor:
        """Return a loss as the backward pass takes it."""
        scale = self.loss_scale
        return loss if scale is None else loss * scale.factor

    @property
    def view(self) -> ModelView:
        """The model as an objective sees it."""
        if self.accelerator.num_processes == 1:
            n_parts = self.config.train.accumulate if self.objective.accumulates == "outputs" else 1
            return ModelView(self.model, self.network, n_parts=n_parts)
        return ModelView(self.model, self.network, partial(of_all_processes, self.accelerator))


SAVED = ("evaluated_step", "lines", "loss_sum", "loss_n", "trained_s", "forked_from")


@dataclass
class RunState:
    """The mutable state of the loop.

    Attributes:
        step: updates made so far; the position of every random stream.
        evaluated_step: the step of the last evaluation.
        saved_step: the step of the last checkpoint.
        lines: every evaluation so far, as in `metrics.jsonl`.
        loss_sum: of the training losses since the last evaluation, over `loss_n` steps.
        trained_s: wall-clock seconds of training so far, over all sittings; of a fork, those since the fork.
        forked_from: step and seed of the float run that this one began from; None if it began itself.
        selected: state of the network at the checkpoint that selection prefers so far.
    """

    step: int = 0
    evaluated_step: int = 0
    saved_step: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_n: int = 0
    trained_s: float = 0.0
    forked_from: dict[str, int] | None = None
    selected: dict[str, Tensor] | None = None

    @property
    def records(self) -> list[Record]:
        """The evaluations so far."""
        return [Record.from_json(line) for line in self.lines]

    def add_loss(self, loss: float) -> None:
        """Count one step's training loss."""
        self.loss_sum += loss
        self.loss_n += 1

    @property
    def mean_loss(self) -> float | None:
        """Mean training loss since the last evaluation; None without a step between."""
        return self.loss_sum / self.loss_n if self.loss_n else None

    def add_line(self, line: dict[str, Any]) -> None:
        """Keep one evaluation of the present step and start counting the training loss anew."""
        self.lines.append(line)
        self.evaluated_step = self.step
        self.loss_sum, self.loss_n = 0.0, 0

    def to_json(self) -> dict[str, Any]:
        """Return what goes into a checkpoint's JSON."""
        return {name: getattr(self, name) for name in SAVED}

    @classmethod
    def from_json(cls, step: int, saved: dict[str, Any]) -> RunState:
        """Return the state that `to_json` described."""
        return cls(step=step, saved_step=step, **{name: saved[name] for name in SAVED if name in saved})
