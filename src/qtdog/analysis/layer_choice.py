"""Bits per layer from the float run on all sources: curvature, rounding error, and the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from torch import Tensor

from qtdog.analysis.bit_plan import BitPlan
from qtdog.analysis.hessian_trace import mean_losses
from qtdog.analysis.mixed_precision import assign_bits, average_bits
from qtdog.analysis.sensitivity import Sensitivity, cost_table, sensitivities
from qtdog.core.progress import Progress
from qtdog.core.random import numpy_stream
from qtdog.data.loader import eval_batches
from qtdog.runs.folder import RunFolder
from qtdog.training.build import compose, make_accelerator
from qtdog.training.checkpoint import Checkpoint
from qtdog.training.components import Parts
from qtdog.training.fork import prefix_config, train_prefix
from qtdog.training.protocol import Problem, make_problem
from qtdog.training.resume import load_plain_
from qtdog.training.run import Voice
from qtdog.training.signals import StopRequest

N_IMAGES = 128  # training images of each source domain for the curvature
BATCH = 32


@dataclass(frozen=True)
class LayerChoice:
    """Bits for each layer.

    Attributes:
        layers: what rounding each one is expected to cost.
        candidates: bit-widths, in the order of `Sensitivity.errors`.
        bits: of each layer.
        budget: bits per quantized weight that were allowed.
    """

    layers: tuple[Sensitivity, ...]
    candidates: tuple[int, ...]
    bits: tuple[int, ...]
    budget: float

    @property
    def average_bits(self) -> float:
        """Bits per quantized weight that are used."""
        return average_bits(self.bits, [layer.curvature.n_weights for layer in self.layers])

    @property
    def cost(self) -> float:
        """Ω, twice the expected rise of the loss."""
        return sum(self.cost_of(bits, layer) for bits, layer in zip(self.bits, self.layers, strict=True))

    def cost_of(self, bits: int, layer: Sensitivity) -> float:
        """Return Ω of one layer at one of the candidates."""
        return layer.costs[self.candidates.index(bits)]

    def uniform_cost(self, bits: int) -> float:
        """Return Ω with one of the candidates for all layers."""
        return sum(self.cost_of(bits, layer) for layer in self.layers)

    def layer_bits(self) -> dict[str, int]:
        """Return bits by layer name; a name comes before those that lie below it, since the last pattern counts."""
        table = {name: bits for layer, bits in zip(self.layers, self.bits, strict=True) for name in layer.names}
        return dict(sorted(table.items(), key=lambda item: item[0].count(".")))

    def to_yaml(self) -> str:
        """Return a preset that sets `quantizer.layer_bits`."""
        head = f"# Bits per layer under a budget of {self.budget:g} per weight; {self.average_bits:.2f} are used.\n"
        return head + yaml.safe_dump({"quantizer": {"layer_bits": self.layer_bits()}}, sort_keys=False)


def choose_layer_bits(
    plan: BitPlan,
    budget: float,
    out: Path,
    *,
    n_vectors: int = 20,
    voice: Voice | None = None,
    progress: Progress = None,
) -> LayerChoice:
    """Return the bits of each layer that cost least under a budget.

    The float part of `plan.config` is trained on all sources (once, kept below `out`); each layer's cost is
    `analysis.sensitivity`'s, with the Hessian of the mean loss over the source domains, each counting once, on training
    images that are not augmented; the budget is met exactly (`analysis.mixed_precision`).

    Args:
        plan: configuration, sources and candidates.
        budget: bits per quantized weight.
        out: folder of the float run.
        n_vectors: random vectors of the curvature.
        voice: how the run speaks to the user.
        progress: is told of batches of images.

    Raises:
        ConfigError: the budget is below the smallest candidate, or as in `sensitivities`.
        Interrupted, RunError, DataError, ModelError: as in `training.fork.train_prefix`.
    """
    assign_bits(np.zeros((1, len(plan.candidates))), [1], plan.candidates, budget)  # a wrong budget shows at once
    prefix = train_prefix(plan.config, plan.sources, RunFolder(out / "float"), voice=voice)
    layers = _sensitivities(plan, prefix, n_vectors, progress)
    n_weights = [layer.curvature.n_weights for layer in layers]
    bits = assign_bits(cost_table(layers), n_weights, plan.candidates, budget)
    return LayerChoice(tuple(layers), plan.candidates, tuple(bits), budget)


def _sensitivities(plan: BitPlan, prefix: Checkpoint, n_vectors: int, progress: Progress) -> list[Sensitivity]:
    config = prefix_config(plan.config)
    problem = make_problem(config, plan.sources)
    parts = compose(config, plan.sources, problem, make_accelerator(config))
    load_plain_(parts.network, prefix.tensors["network"])
    with StopRequest() as stop:
        losses = _losses(parts, problem, stop, progress)
        how, seed = plan.config.quantizer, config.train.seed
        return sensitivities(parts.network, losses, how, plan.candidates, n_vectors=n_vectors, seed=seed)


def _losses(parts: Parts, problem: Problem, stop: StopRequest, progress: Progress) -> Iterator[tuple[Tensor, float]]:
    """Yield the losses of every source domain's images; each domain weighs the same."""
    drawn = [_drawn(parts.config.train.seed, domain, pool) for domain, pool in problem.train_pools().items()]
    total, done = sum(-(-len(indices) // BATCH) for indices in drawn), 0
    for indices in drawn:
        images = parts.batches
        batches = eval_batches(
            images.cache, indices, images.class_index, batch_size=BATCH, mean=images.mean, std=images.std
        )
        for loss, share in mean_losses(parts.network, batches, len(indices)):
            stop.check()
            yield loss, share / len(drawn)
            done += 1
            if progress is not None:
                progress(done, total)


def _drawn(seed: int, domain: str, pool: np.ndarray) -> np.ndarray:
    order = numpy_stream(seed, "curvature", domain).permutation(len(pool))
    return np.sort(pool[order[:N_IMAGES]])


def uniform_candidate(candidates: Sequence[int], budget: float) -> int:
    """Return the most bits that all layers could have under a budget.

    Example:
        >>> uniform_candidate([8, 6, 4], 7.5)
        6
    """
    return max(bits for bits in candidates if bits <= budget)
