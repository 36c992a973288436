"""Step rules: how a loss becomes an update (plain, SAM, SAGM); learning-rate schedules and the linear probe."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import sites
from qtdog.core.registry import HyperParameter, HyperParameters, Registry, Value, fill
from qtdog.models.network import Network
from qtdog.objectives.base import changing_buffers


def lr_factor(schedule: str, step: int, *, decay_from: int, steps: int) -> float:
    """Return the multiple of the learning rate at one step.

    Constant is the protocol's (DomainBed). The others hold the rate until `decay_from` and then let it fall to zero at
    the end of the run: with t = (step - decay_from) / (steps - decay_from),

        linear: 1 - t        cosine: (1 + cos(π t)) / 2   (Loshchilov and Hutter, ICLR 2017, without restarts)

    Args:
        schedule: "constant", "linear" or "cosine".
        step: updates made so far.
        decay_from: first step of the fall.
        steps: of the run.

    Example:
        >>> [lr_factor("linear", step, decay_from=2, steps=6) for step in range(6)]
        [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        >>> round(lr_factor("cosine", 4, decay_from=2, steps=6), 6), lr_factor("constant", 5, decay_from=2, steps=6)
        (0.5, 1.0)
    """
    if schedule == "constant" or step <= decay_from:
        return 1.0
    share = (step - decay_from) / (steps - decay_from)
    return 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2


def keep_classifier_gradients_(network: Network, objective: nn.Module) -> None:
    """Drop every gradient but the classifier's.

    An optimizer leaves a parameter without a gradient alone: no decay, no momentum, no moments gathered. So a random
    classifier fits the pretrained features before they move (Kumar et al., ICLR 2022; DiWA, Rame et al., NeurIPS 2022,
    and ERM++, Teterwak et al., 2023, begin so).

    Example:
        >>> import torch
        >>> network = Network(nn.Linear(3, 2), nn.Linear(2, 2), freeze_bn=True)
        >>> network(torch.ones(1, 3)).sum().backward()
        >>> keep_classifier_gradients_(network, nn.Identity())
        >>> network.featurizer.weight.grad is None, network.classifier.weight.grad is None
        (True, False)
    """
    kept = {id(parameter) for parameter in network.classifier.parameters()}
    for parameter in chain(network.parameters(), objective.parameters()):
        if id(parameter) not in kept:
            parameter.grad = None


class Optimizer(Protocol):
    """The part of an optimizer that a step rule uses (torch's, or accelerate's wrapper of it)."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        ...

    def step(self) -> None:
        """Update all parameters."""
        ...


@dataclass(frozen=True)
class Update:
    """What a step rule works on.

    Attributes:
        backward: computes the loss of this step's batch, adds its gradients to the parameters, returns the loss. Called
            again it sees the same batch and draws the same noise. It may raise, and then the rule must leave the
            parameters as they were.
        optimizer: holds the parameters.
        network: the plain network, quantizers attached.
    """

    backward: Callable[[], Tensor]
    optimizer: Optimizer
    network: nn.Module


class StepRule(ABC):
    """One update; abstract.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        N_PASSES: forward and backward passes per update, for the accounting of cost.
        params: the values of the hyper-parameters.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    N_PASSES: ClassVar[int] = 1

    def __init__(self, params: Mapping[str, Value]) -> None:
        self.params = fill(f"step rule '{STEP_RULES.name_of(type(self))}'", self.HYPERPARAMETERS, params)

    @abstractmethod
    def __call__(self, update: Update) -> Tensor:
        """Make the update and return the loss before it, a scalar."""


STEP_RULES: Registry[type[StepRule]] = Registry("step rule")


@STEP_RULES.register("plain")
class Plain(StepRule):
    """One optimizer step on the gradient of the loss."""

    def __call__(self, update: Update) -> Tensor:
        """Make the update and return the loss before it."""
        update.optimizer.zero_grad()
        loss = update.backward()
        update.optimizer.step()
        return loss


SPACE = HyperParameter(
    "dequantized",
    "where a quantized weight is moved: at the quantizer's output, or before it ('latent')",
    choices=("dequantized", "latent"),
)


def moving_weights(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `network` that a perturbation moves: those with a gradient, but no quantizer's own.

    A step size is about 2e-3: a move that is small for a weight would break the grid that all its weights live on.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.bias.grad = None
        >>> [tuple(weight.shape) for weight in moving_weights(layer)]
        [(1, 2)]
    """
    own = {id(parameter) for site in sites(network) for parameter in site.quantizer.parameters()}
    return [value for value in network.parameters() if value.grad is not None and id(value) not in own]


def gradient_norm(weights: Sequence[nn.Parameter]) -> Tensor:
    """Return the length of the joint gradient of `weights`, a scalar; 0 for none; the same in whatever order they come.

    Example:
        >>> weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        >>> (3 * weights[0] + 4 * weights[1]).backward()
        >>> gradient_norm(weights).item()
        5.0
    """
    norms = [torch.linalg.vector_norm(weight.grad) for weight in weights if weight.grad is not None]
    if not norms:
        return torch.zeros(())
    # Sorted, because a network with quantizers attached has its parameters in another order than a plain one, and a run
    # that begins from a float run must go on to the last bit as if it had trained alone.
    return torch.linalg.vector_norm(torch.stack(norms).sort().values)


@contextlib.contextmanager
def perturbed(network: nn.Module, weights: Sequence[nn.Parameter], factor: Tensor, space: str) -> Iterator[None]:
    """Let `network` have w + factor · gradient in place of each w inside the block.

    After it the parameters are what they were, bit for bit (from copies: subtracting would round), and so are the
    buffers: a pass inside the block leaves no trace in the running statistics of batch norm. Gradients may be changed
    inside the block; those at its beginning count.

    In the `latent` space everything is added to the parameters. A quantizer hides a move that stays within a bin, and
    makes a whole step of one that does not. In the `dequantized` space the move of a quantized weight is added to what
    its quantizer returns, so that the network has exactly the perturbed weights; the gradient still reaches the latent
    weight straight through.

    Args:
        network: with or without quantizers.
        weights: parameters of it that have gradients.
        factor: scalar.
        space: "latent" or "dequantized".

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> before = layer.weight.item()
        >>> layer(torch.ones(1, 1)).sum().backward()
        >>> with perturbed(layer, [layer.weight], torch.tensor(0.5), "latent"):
        ...     round(layer.weight.item() - before, 4)
        0.5
        >>> layer.weight.item() == before
        True
    """
    quantizers = {id(site.weight): site.quantizer for site in sites(network)} if space == "dequantized" else {}
    saved = [(buffer, buffer.clone()) for buffer in changing_buffers(network)]
    with contextlib.ExitStack() as undo:
        undo.callback(_put_back, saved)
        for weight in weights:
            assert weight.grad is not None
            move = weight.grad * factor
            if id(weight) in quantizers:
                quantizers[id(weight)].move = move
                undo.callback(setattr, quantizers[id(weight)], "move", None)
            else:
                saved.append((weight.data, weight.detach().clone()))
                weight.data.add_(move)
        yield


def _put_back(saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    for value, copy in saved:
        value.copy_(copy)


RHO = HyperParameter(0.05, "length of the perturbation", low=0, search=(0.01, 0.5), log=True)
TINY = 1e-12  # added to the norm: a gradient of zero moves nothing


@STEP_RULES.register("sam")
class SAM(StepRule):
    """Sharpness-aware minimization: the gradient is taken at the worst weights nearby (Foret et al., 2021).

    Formula: ε = ρ · g / ‖g‖ with g = ∇L(w), then the optimizer's step from w with ∇L(w + ε) (Eq. 2 and 3), both on the
    same batch, with the same random draws. The norm is over all weights that have a gradient, joined. The default ρ and
    the range of its search are the paper's, which tries 0.01 to 0.5.

    With quantization ε is by default added to the dequantized weights. Added to the latent ones it nearly always stays
    within a bin and vanishes, and a weight that does change its bin moves by a whole step: spread over the 23 million
    weights of a ResNet-50, ρ = 0.05 is 1e-5 for each, 1/300 of a step of 3e-3. About one weight in 300 moves, and
    together they go 0.8 far, not 0.05. `space: latent` is there to compare. Before the start step both are the same.

    Not moved are the step sizes, and the parameters of the objective (encoders, discriminators): they are not
    saved. Both train with the gradient at w + ε. In several processes the gradients are joined before the rule sees
    them, so that all move alike.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {"rho": RHO, "space": SPACE}
    N_PASSES: ClassVar[int] = 2

    def __call__(self, update: Update) -> Tensor:
        """Make the update and return the loss at the weights before it."""
        update.optimizer.zero_grad()
        loss = update.backward()
        weights = moving_weights(update.network)
        factor = float(self.params["rho"]) / (gradient_norm(weights) + TINY)
        with perturbed(update.network, weights, factor, str(self.params["space"])):
            update.optimizer.zero_grad()
            update.backward()
        update.optimizer.step()
        return loss


ALPHA = HyperParameter(0.001, "share of the gradient taken off the perturbation", low=0, search=(1e-4, 1e-2), log=True)


@STEP_RULES.register("sagm")
class SAGM(StepRule):
    """Sharpness-aware gradient matching: clean and perturbed loss and the gap between them (Wang et al., CVPR 2023).

    Formula: min L(w) + L(w + ε - α·g) with g = ∇L(w) and ε = ρ · g / ‖g‖, so the optimizer gets the sum

        ∇L(w) + ∇L(w + (ρ / ‖g‖ - α) · g)

    of two passes over the same batch. To first order the second term also rewards gradients of the clean and of the
    perturbed loss that point the same way. Defaults are the paper's. Their code takes half of the sum, which is the
    same for Adam; with SGD halve the learning rate to compare.

    What is moved, and where with quantization, is as in `sam`; step sizes get the same sum of two gradients.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {"rho": RHO, "alpha": ALPHA, "space": SPACE}
    N_PASSES: ClassVar[int] = 2

    def __call__(self, update: Update) -> Tensor:
        """Make the update and return the loss at the weights before it."""
        update.optimizer.zero_grad()
        loss = update.backward()
        weights = moving_weights(update.network)
        factor = float(self.params["rho"]) / (gradient_norm(weights) + TINY) - float(self.params["alpha"])
        with perturbed(update.network, weights, factor, str(self.params["space"])):
            update.backward()  # adds to the gradients that are there
        update.optimizer.step()
        return loss
