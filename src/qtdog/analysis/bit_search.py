"""Train or price every candidate of a bit plan on the sources alone, and choose; the target is not in sight."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from torch import Tensor

from qtdog.analysis.bit_plan import BitPlan, BitTrial, place
from qtdog.analysis.flatness import Flatness, local_flatness, weight_norm
from qtdog.analysis.hessian import mean_losses
from qtdog.analysis.mixed_precision import Sensitivity, assign_bits, average_bits, layer_costs, sensitivities
from qtdog.core.config import Config, config_hash
from qtdog.core.errors import CollapseError, NonFiniteLossError
from qtdog.core.files import write_atomic
from qtdog.core.progress import Progress
from qtdog.core.random import numpy_stream
from qtdog.core.safe_text import read_json
from qtdog.data.corruptions import SEVERITIES, CorruptedCache
from qtdog.data.dataset import DomainDataset
from qtdog.data.decoded_cache import DecodedCache, open_cache
from qtdog.models.backbones import preprocessing
from qtdog.models.network import Network
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components, make_accelerator
from qtdog.training.checkpoint import Checkpoint
from qtdog.training.components import Components
from qtdog.training.evaluation import EvaluationInputs, Evaluator
from qtdog.training.load_model import load_model
from qtdog.training.protocol import make_protocol
from qtdog.training.run import RunCallbacks, run, train_fork_point
from qtdog.training.shared_steps import fork_point_config, load_plain_
from qtdog.training.stop import StopRequest

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
    callbacks: RunCallbacks | None = None,
    progress: Progress = None,
) -> LayerChoice:
    """Return the bits of each layer that cost least under a budget.

    The float part of `plan.config` is trained on all sources (once, kept below `out`); each layer's cost is
    `analysis.mixed_precision`'s, with the Hessian of the mean loss over the source domains, each counting once, on
    training images that are not augmented; the budget is met exactly.

    Args:
        plan: configuration, sources and candidates.
        budget: bits per quantized weight.
        out: folder of the float run.
        n_vectors: random vectors of the curvature.
        callbacks: how the run speaks to the user.
        progress: reports batches of images.

    Raises:
        ConfigError: the budget is below the smallest candidate, or as in `sensitivities`.
        Interrupted, RunError, DataError, ModelError: as in `training.run.train_fork_point`.
    """
    assign_bits(np.zeros((1, len(plan.candidates))), [1], plan.candidates, budget)  # a wrong budget shows at once
    prefix = train_fork_point(plan.config, plan.sources, RunFolder(out / "float"), callbacks=callbacks)
    layers = _sensitivities(plan, prefix, n_vectors, progress)
    n_weights = [layer.curvature.n_weights for layer in layers]
    bits = assign_bits(layer_costs(layers), n_weights, plan.candidates, budget)
    return LayerChoice(tuple(layers), plan.candidates, tuple(bits), budget)


def _sensitivities(plan: BitPlan, prefix: Checkpoint, n_vectors: int, progress: Progress) -> list[Sensitivity]:
    config = fork_point_config(plan.config)
    parts = build_components(config, plan.sources)
    load_plain_(parts.network, prefix.tensors["network"])
    with StopRequest() as stop:
        losses = _losses(parts, stop, progress)
        quantizer, seed = plan.config.quantizer, config.train.seed
        return sensitivities(parts.network, losses, quantizer, plan.candidates, n_vectors=n_vectors, seed=seed)


def _losses(parts: Components, stop: StopRequest, progress: Progress) -> Iterator[tuple[Tensor, float]]:
    """Yield the losses of every source domain's images; each domain weighs the same."""
    drawn = [_drawn(parts.config.train.seed, domain, pool) for domain, pool in parts.protocol.train_pools().items()]
    total, done = sum(-(-len(indices) // BATCH) for indices in drawn), 0
    for indices in drawn:
        batches = parts.inputs.batches(indices, BATCH)
        for loss, share in mean_losses(parts.network, batches, len(indices)):
            stop.check_interrupt()
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


GAMMA_FRAC = 0.05  # of the length of the float weights: the radius if none is given


@dataclass(frozen=True)
class BitTrials:
    """Runs a plan.

    Attributes:
        plan: what is tried.
        out: folder of all runs.
        callbacks: how the runs speak to the user.
        say: called with a line about what begins.
        measuring: reports the random directions of each flatness.
    """

    plan: BitPlan
    out: Path
    callbacks: RunCallbacks = field(default_factory=RunCallbacks)
    say: Callable[[str], None] = lambda text: None
    measuring: Progress = None

    def run(self) -> list[BitTrial]:
        """Return the trial of every candidate without every source domain; what is finished is not done again.

        Raises:
            Interrupted: a signal asked to stop; calling again goes on.
            RunError: a folder below `out` is in use or holds another run, or the disk is full.
            ConfigError, DataError, ModelError: as in `training.run.run`.
        """
        return [trial for left_out in self.plan.sources.domains for trial in self._without(left_out)]

    def _without(self, left_out: str) -> list[BitTrial]:
        plan = self.plan
        self.say(f"without {left_out}: {plan.start:,} float steps")
        shared = plan.trial_config(left_out, plan.candidates[0])
        prefix = train_fork_point(
            shared, plan.sources, RunFolder(place(self.out, left_out, "float")), callbacks=self.callbacks
        )
        trials = []
        for bits in plan.candidates:
            self.say(f"without {left_out}: {plan.steps_each:,} steps with {bits} bits")
            folder = RunFolder(place(self.out, left_out, f"{bits}-bit"))
            trials.append(self._trial(plan.trial_config(left_out, bits), prefix, folder))
        return trials

    def _trial(self, config: Config, prefix: Checkpoint, folder: RunFolder) -> BitTrial:
        asked = {"config_hash": config_hash(config), "gamma": self.plan.gamma, "n_directions": self.plan.n_directions}
        shift = self.plan.shift  # the training is the same, so each shift has a file of its own beside it
        file = folder.path / ("trial.json" if not shift else f"trial-{'+'.join(shift)}.json")
        if file.is_file() and (kept := read_json(file))["asked"] == asked:
            return BitTrial(**kept["trial"])
        accelerator = make_accelerator(config)
        trial = self._made(config, prefix, folder, accelerator)
        if accelerator.is_main_process:
            write_atomic(file, json.dumps({"asked": asked, "trial": asdict(trial)}, indent=1))
        accelerator.wait_for_everyone()
        return trial

    def _made(self, config: Config, prefix: Checkpoint, folder: RunFolder, accelerator: Accelerator) -> BitTrial:
        """Train one candidate and measure it; one that collapses has no accuracy, and the others go on."""
        bits, left_out = config.quantizer.bits, config.data.target
        try:
            result = run(config, self.plan.sources, folder, resume=True, callbacks=self.callbacks, fork_from=prefix)
        except (CollapseError, NonFiniteLossError) as error:
            self.callbacks.warn(f"{bits} bits without {left_out}: {error}")
            return BitTrial(bits, left_out, failed=str(error))
        network = load_model(folder.model_file, device=accelerator.device).network
        gamma = self.plan.gamma or GAMMA_FRAC * float_norm(network, prefix)
        flat = self._flatness(config, network, gamma, accelerator)
        accuracy = result["test_accuracy"]
        if self.plan.shift:
            accuracy = corrupted_accuracy(config, self.plan.sources, network, accelerator, self.plan.shift)
        return BitTrial(bits, left_out, accuracy, **_numbers(flat), n_bytes=result["size"]["bytes"])

    def _flatness(self, config: Config, network: Network, gamma: float, accelerator: Accelerator) -> Flatness:
        loss = source_loss(config, self.plan.sources, network, accelerator)
        with StopRequest() as stop:

            def watched() -> float:
                if accelerator.num_processes == 1:  # one of several would leave the others waiting
                    stop.check_interrupt()
                return loss()

            n_directions, seed = self.plan.n_directions, config.train.seed
            (flat,) = local_flatness(
                network, watched, [gamma], n_directions=n_directions, seed=seed, progress=self.measuring
            )
        return flat


def _numbers(flat: Flatness) -> dict[str, Any]:
    return {"flatness": flat.increase, "flatness_error": flat.standard_error, "gamma": flat.gamma}


def float_norm(network: Network, prefix: Checkpoint) -> float:
    """Return the length of all parameters of the float run joined: one scale for all candidates that began from it."""
    own = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(prefix.tensors["network"])
    norm = weight_norm(network)
    network.load_state_dict(own)
    return norm


def source_loss(
    config: Config, dataset: DomainDataset, network: Network, accelerator: Accelerator
) -> Callable[[], float]:
    """Return a function that gives a network's mean cross-entropy on the held-out images of the training sources."""
    evaluator, images = _on_validation(config, dataset, network, accelerator)
    return lambda: evaluator.score(images).loss


def corrupted_accuracy(
    config: Config, dataset: DomainDataset, network: Network, accelerator: Accelerator, corruptions: Sequence[str]
) -> float:
    """Return a network's accuracy on held-out images of the training sources, mean over corruptions and severities."""
    evaluator, images = _on_validation(config, dataset, network, accelerator)
    clean = evaluator.inputs.cache
    assert isinstance(clean, DecodedCache)
    scores = []
    for name in corruptions:
        for severity in SEVERITIES:
            inputs = replace(evaluator.inputs, cache=CorruptedCache(clean, name, severity))
            scores.append(replace(evaluator, inputs=inputs).score(images).accuracy)
    return float(np.mean(scores))


def _on_validation(
    config: Config, dataset: DomainDataset, network: Network, accelerator: Accelerator
) -> tuple[Evaluator, np.ndarray]:
    protocol = make_protocol(config, dataset)
    cache = open_cache(dataset, config.data.image_size)
    mean, std = preprocessing(config.model.backbone, channels=dataset.card.channels)
    inputs = EvaluationInputs(cache, dataset.class_index, mean, std)
    evaluator = Evaluator(network, accelerator, inputs, protocol, "target")
    return evaluator, np.concatenate(list(protocol.selection_sets().values()))
