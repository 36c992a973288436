"""Training the float steps once, for several runs that differ only in what comes after them."""

from __future__ import annotations

import contextlib

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, RunError
from qtdog.data.dataset import DomainDataset
from qtdog.runs.folder import RunFolder
from qtdog.training.build import compose, make_accelerator
from qtdog.training.checkpoint import Checkpoint, latest_checkpoint
from qtdog.training.protocol import make_problem
from qtdog.training.resume import begin
from qtdog.training.run import Voice, drive


def prefix_config(config: Config) -> Config:
    """Return the float run whose first steps are those of `config`: no quantizer, no averager, the same learning rates.

    Configurations that differ only in their quantizer's choices (but not in its start step) have the same one.

    Example:
        >>> from qtdog.core.config_io import build_config
        >>> four, seven = (build_config([{"quantizer": {"bits": bits}}]) for bits in (4, 7))
        >>> prefix_config(four) == prefix_config(seven) != four
        True
    """
    float_run = Config.model_validate({"quantizer": {"name": "none"}})
    optimizer = config.optimizer.model_copy(update={"decay_from": config.decay_from})
    parts = {"quantizer": float_run.quantizer, "averager": float_run.averager, "optimizer": optimizer}
    return config.model_copy(update=parts)


def train_prefix(
    config: Config,
    dataset: DomainDataset,
    folder: RunFolder,
    *,
    until: int | None = None,
    resume: bool = True,
    voice: Voice | None = None,
) -> Checkpoint:
    """Train the float part of `config` in `folder` and return its checkpoint, for `run(…, fork_from=…)`.

    It can be stopped and resumed like a run; if it is there already nothing is trained.

    Args:
        config: the effective configuration of a run that is to begin from it.
        dataset: the data it names.
        folder: where the float run is kept; another configuration with the same float part finds it there.
        until: updates to make; default: up to the start of quantization.
        resume: go on with what is in the folder.
        voice: how to speak to the user.

    Raises:
        ConfigError: there is no step to train: no start step and no `until`, or one outside the run.
        RunError: the folder is in use, or holds something else, or went on beyond the step.
        Interrupted, NonFiniteLossError, DataError, ModelError: as in `training.run.run`.
    """
    step = _checked_until(config, until)
    plan = prefix_config(config)
    voice = voice or Voice()
    accelerator = make_accelerator(plan)
    main = accelerator.is_main_process
    with folder.lock() if main else contextlib.nullcontext():
        if main:
            folder.claim(plan, resume=resume)
        accelerator.wait_for_everyone()
        checkpoint = latest_checkpoint(folder.checkpoints, voice.warn)
        if checkpoint is None or checkpoint.step < step:
            problem = make_problem(plan, dataset)
            parts = compose(plan, dataset, problem, accelerator, voice.progress)
            drive(parts, begin(parts, folder, voice.warn), folder, problem, voice=voice, until=step)
            accelerator.wait_for_everyone()
            checkpoint = latest_checkpoint(folder.checkpoints, voice.warn)
    if checkpoint is None or checkpoint.step != step:
        found = "none" if checkpoint is None else f"one at step {checkpoint.step}"
        raise RunError(f"{folder.path} should have a checkpoint at step {step}, found {found}; choose another folder")
    return checkpoint


def _checked_until(config: Config, until: int | None) -> int:
    step = config.start_step if until is None else until
    if step is None:
        raise ConfigError(f"quantizer '{config.quantizer.name}' has no start step: say until which step to train")
    last = config.train.steps - 1 if config.start_step is None else config.start_step
    if not 0 < step <= last:
        raise ConfigError(f"there are no {step} float steps to share: it takes 1 to {last}")
    return step
