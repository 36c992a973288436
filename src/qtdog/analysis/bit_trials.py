"""Training every candidate without every source domain, from one float run per domain; all of it kept and resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from qtdog.analysis.bit_choice import Trial
from qtdog.analysis.bit_plan import BitPlan, place
from qtdog.analysis.flatness import Flatness, local_flatness, weight_norm
from qtdog.core.config import Config, config_hash
from qtdog.core.errors import CollapseError, NonFiniteLossError
from qtdog.core.files import write_atomic
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.data.decoded_cache import open_cache
from qtdog.models.backbones import preprocessing
from qtdog.models.network import Network
from qtdog.runs.folder import RunFolder
from qtdog.training.build import make_accelerator
from qtdog.training.checkpoint import Checkpoint
from qtdog.training.evaluation import Evaluator
from qtdog.training.fork import train_prefix
from qtdog.training.load import load
from qtdog.training.protocol import make_problem
from qtdog.training.run import Voice, run
from qtdog.training.signals import StopRequest

GAMMA_FRAC = 0.05  # of the length of the float weights: the radius if none is given


@dataclass(frozen=True)
class BitTrials:
    """Runs a plan.

    Attributes:
        plan: what is tried.
        out: folder of all runs.
        voice: how the runs speak to the user.
        say: is told in a line what begins.
        measuring: is told of the random directions of each flatness.
    """

    plan: BitPlan
    out: Path
    voice: Voice = field(default_factory=Voice)
    say: Callable[[str], None] = lambda text: None
    measuring: Progress = None

    def run(self) -> list[Trial]:
        """Return the trial of every candidate without every source domain; what is finished is not done again.

        Raises:
            Interrupted: a signal asked to stop; calling again goes on.
            RunError: a folder below `out` is in use or holds another run, or the disk is full.
            ConfigError, DataError, ModelError: as in `training.run.run`.
        """
        return [trial for left_out in self.plan.sources.domains for trial in self._without(left_out)]

    def _without(self, left_out: str) -> list[Trial]:
        plan = self.plan
        self.say(f"without {left_out}: {plan.start:,} float steps")
        shared = plan.trial_config(left_out, plan.candidates[0])
        prefix = train_prefix(shared, plan.sources, RunFolder(place(self.out, left_out, "float")), voice=self.voice)
        trials = []
        for bits in plan.candidates:
            self.say(f"without {left_out}: {plan.steps_each:,} steps with {bits} bits")
            folder = RunFolder(place(self.out, left_out, f"{bits}-bit"))
            trials.append(self._trial(plan.trial_config(left_out, bits), prefix, folder))
        return trials

    def _trial(self, config: Config, prefix: Checkpoint, folder: RunFolder) -> Trial:
        asked = {"config_hash": config_hash(config), "gamma": self.plan.gamma, "n_directions": self.plan.n_directions}
        file = folder.path / "trial.json"
        if file.is_file() and (kept := json.loads(file.read_text()))["asked"] == asked:
            return Trial(**kept["trial"])
        accelerator = make_accelerator(config)
        trial = self._made(config, prefix, folder, accelerator)
        if accelerator.is_main_process:
            write_atomic(file, json.dumps({"asked": asked, "trial": asdict(trial)}, indent=1))
        accelerator.wait_for_everyone()
        return trial

    def _made(self, config: Config, prefix: Checkpoint, folder: RunFolder, accelerator: Accelerator) -> Trial:
        """Train one candidate and measure it; one that collapses has no accuracy, and the others go on."""
        bits, left_out = config.quantizer.bits, config.data.target
        try:
            result = run(config, self.plan.sources, folder, resume=True, voice=self.voice, fork_from=prefix)
        except (CollapseError, NonFiniteLossError) as error:
            self.voice.warn(f"{bits} bits without {left_out}: {error}")
            return Trial(bits, left_out, failed=str(error))
        network = load(folder.model_file, device=accelerator.device).network
        gamma = self.plan.gamma or GAMMA_FRAC * float_norm(network, prefix)
        flat = self._flatness(config, network, gamma, accelerator)
        return Trial(bits, left_out, result["test_accuracy"], **_numbers(flat), n_bytes=result["size"]["bytes"])

    def _flatness(self, config: Config, network: Network, gamma: float, accelerator: Accelerator) -> Flatness:
        loss = source_loss(config, self.plan.sources, network, accelerator)
        with StopRequest() as stop:

            def watched() -> float:
                if accelerator.num_processes == 1:  # one of several would leave the others waiting
                    stop.check()
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
    problem = make_problem(config, dataset)
    cache = open_cache(dataset, config.data.image_size)
    mean, std = preprocessing(config.model.backbone, channels=dataset.sheet.channels)
    evaluator = Evaluator(network, accelerator, cache, dataset.class_index, problem, "target", mean, std)
    images = np.concatenate(list(problem.selection_sets().values()))
    return lambda: evaluator.score(images).loss
