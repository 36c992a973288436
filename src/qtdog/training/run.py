"""One run, from a configuration to a finished folder, started or resumed; and the float steps that several share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qtdog.conversion.inspect import LayerHealth
from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, RunError
from qtdog.core.progress import CallbackList, Progress, RunCallback
from qtdog.data.dataset import DomainDataset
from qtdog.objectives.wrappers import Teacher
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import SourceRecord
from qtdog.training.build import build_components, make_accelerator
from qtdog.training.checkpoint import Checkpoint, latest_checkpoint, put_aside_broken, restore, warn_of_threads
from qtdog.training.components import Components, RunState
from qtdog.training.finalize import final_network_, write_run_result
from qtdog.training.loop import TrainingRun, nothing, train
from qtdog.training.plugins import keep_plugins
from qtdog.training.shared_steps import SharedRun, SharedUpdates, begin_fork_, fork_point_config, open_shared_runs
from qtdog.training.stop import HealthWatch, StopRequest, chance_accuracy, interruption

HealthCheck = Callable[[list[LayerHealth], list[SourceRecord]], None]


def health_watch(components: Components, warn: Callable[[str], None]) -> HealthCheck:
    """Return the watch that warns of ill layers and stops a run that has fallen to chance."""
    sets = list(components.protocol.selection_sets().values())
    chance = chance_accuracy(components.inputs.class_index, sets, components.network.classifier.out_features)
    return HealthWatch(components.config, chance, warn)


def no_health_check(components: Components, warn: Callable[[str], None]) -> HealthCheck:
    """Return a check that finds nothing."""
    del components, warn
    return nothing


@dataclass(frozen=True)
class RunCallbacks:
    """What a run calls while it lasts.

    Attributes:
        callback: is called with steps and evaluations; None for none.
        progress: of decoding images.
        warn: is called with what went wrong without stopping the run.
        quantizing: progress of post-training quantization.
        make_health_check: returns what looks at the quantized layers of a run at each evaluation, given what to warn
            with; it may raise CollapseError. `no_health_check` for runs so short that chance means nothing.
    """

    callback: RunCallback | None = None
    progress: Progress = None
    warn: Callable[[str], None] = print
    quantizing: Progress = None
    make_health_check: Callable[[Components, Callable[[str], None]], HealthCheck] = health_watch


def run(
    config: Config,
    dataset: DomainDataset,
    folder: RunFolder,
    *,
    resume: bool = False,
    callbacks: RunCallbacks | None = None,
    fork_from: Checkpoint | None = None,
    teacher: Teacher | None = None,
    shared_runs: Sequence[SharedRun] = (),
) -> dict[str, Any]:
    """Train, select and save a model as `config` says, in `folder`; return the result.

    A finished folder of the same configuration is left as it is and its result is returned.

    Args:
        config: the effective configuration (`training.protocol.resolve`).
        dataset: the data it names.
        folder: where everything is written.
        resume: go on from the last whole checkpoint, if there is one.
        callbacks: progress, warnings, callback.
        fork_from: begin from this checkpoint of a float run (`train_fork_point`) unless the folder has one of its own;
            the outcome is the same, bit for bit, but for the time that its training took.
        teacher: images → logits, if the configuration names one (`ensemble.teacher.load_teacher`).
        shared_runs: unfinished runs that differ in their averager alone; those that stand where this one begins follow
            its updates and are left at their last checkpoint, from which `run` finishes them.

    Raises:
        RunError: the folder is in use, or holds another or an unfinished run; the disk is full; or `fork_from` is none
            that this run could begin from.
        Interrupted: a signal asked to stop; the state was saved.
        NonFiniteLossError: the loss became NaN; the last good state was saved.
        CollapseError: a quantized network fell to chance; the state was saved, and `diagnosis.json` says more.
        ConfigError, DataError, ModelError: as in `training.build.build_components`; nothing is left in the folder.
    """
    callbacks = callbacks or RunCallbacks()
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    with folder.lock() if main else contextlib.nullcontext():
        if main:
            folder.check_claim(config, resume=resume)
        accelerator.wait_for_everyone()
        if (result := folder.read_result()) is not None:
            if not (problem := folder.model_problem(result)):
                folder.require_result(result)
                return result
            callbacks.warn(f"{problem}; it is made again")
        components = build_components(config, dataset, accelerator, callbacks.progress, teacher=teacher)
        if main:
            folder.claim(config, resume=resume)
            keep_plugins(config, folder.path)
            folder.keep_skipped(dataset.skipped)
        if config.train.precision == "fp16" and components.accelerator.device.type == "cpu":
            callbacks.warn("float16 can be a hundred times slower than float32 on a CPU: take train.precision=fp32")
        state = initial_state(components, folder, callbacks.warn, fork_from)
        train_in_folder(components, state, folder, callbacks=callbacks, shared_runs=shared_runs, fork_from=fork_from)
        with StopRequest() as stop:
            check_interrupt = interrupt_check(components, stop)
            final = final_network_(components, state, check_interrupt=check_interrupt, progress=callbacks.quantizing)
        if main:
            write_run_result(components, state, final, folder)
        accelerator.wait_for_everyone()
    result = folder.read_result()
    assert result is not None
    return result


def initial_state(
    components: Components, folder: RunFolder, warn: Callable[[str], None], fork_from: Checkpoint | None = None
) -> RunState:
    """Return where to go on: at the folder's last whole checkpoint, else at `fork_from`, else at the start.

    Raises:
        RunError: the checkpoint does not fit (`training.checkpoint.restore`, `training.shared_steps.begin_fork_`).
    """
    checkpoint = latest_checkpoint(folder.checkpoints, warn)
    if components.accelerator.is_main_process:
        put_aside_broken(folder.checkpoints, None if checkpoint is None else checkpoint.step)
    if checkpoint is not None:
        warn_of_threads(checkpoint, warn)
        return restore(components, checkpoint, folder)
    return RunState() if fork_from is None else begin_fork_(components, fork_from)


def train_in_folder(
    components: Components,
    state: RunState,
    folder: RunFolder,
    *,
    callbacks: RunCallbacks,
    until: int | None = None,
    shared_runs: Sequence[SharedRun] = (),
    fork_from: Checkpoint | None = None,
) -> None:
    """Train from where `state` stands to the end, or to step `until`, with metrics, checkpoints and diagnosis.

    Args:
        components: of the run.
        state: where it stands.
        folder: where it writes.
        callbacks: progress, warnings, callback.
        until: updates made at the end; None for all.
        shared_runs: as in `run`.
        fork_from: the checkpoint that the run began from, for `shared_runs`.

    Raises:
        Interrupted, NonFiniteLossError, CollapseError: as in `training.loop.train`.
    """
    config, user = components.config, callbacks.callback or RunCallback()
    if until is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": until})})
    with (
        contextlib.ExitStack() as locks,
        StopRequest() as stop,
        folder.diagnosis(),
        contextlib.ExitStack() as ending,
    ):
        followers = []
        if shared_runs:
            opened = open_shared_runs(shared_runs, components, state.step, callbacks.warn, fork_from)
            followers = locks.enter_context(opened)
        check_interrupt = interrupt_check(components, stop)
        check_health = callbacks.make_health_check(components, callbacks.warn)
        run = TrainingRun(components, state, folder, check_health)
        if state.records and state.step == components.config.train.steps:
            # all updates are made, perhaps by another run, which shared them and gave no warning of this one
            check_health([], [record.seen for record in state.records])
        for one in followers:
            one.check_health = callbacks.make_health_check(one.components, nothing)
        if components.accelerator.is_main_process:
            for one in [run, *followers]:
                assert one.folder is not None
                one.folder.rewrite_metrics(one.state.lines)
        callback = user
        if followers:  # what the others have is settled before the user may stop the run
            callback = CallbackList([SharedUpdates(run, followers, check_interrupt), user])
        callback.on_start(config, state.step)
        ending.callback(callback.on_end)
        train(run, until=until, callback=callback, check_interrupt=check_interrupt)


def interrupt_check(components: Components, stop: StopRequest) -> Callable[[], None]:
    """Return what raises Interrupted once a signal came: in all processes at once, whichever of them got it."""
    accelerator = components.accelerator
    if accelerator.num_processes == 1:
        return stop.check_interrupt

    def check_together() -> None:
        mine = torch.tensor(float(stop.signal or 0), device=accelerator.device)
        signals = accelerator.gather(mine.reshape(1))
        assert isinstance(signals, torch.Tensor)
        number = int(signals.max().item())
        if number:
            raise interruption(number)

    return check_together


def train_fork_point(
    config: Config,
    dataset: DomainDataset,
    folder: RunFolder,
    *,
    until: int | None = None,
    resume: bool = True,
    callbacks: RunCallbacks | None = None,
) -> Checkpoint:
    """Train the float part of `config` in `folder` and return its checkpoint, for `run(…, fork_from=…)`.

    It can be stopped and resumed like a run; if it is there already nothing is trained.

    Args:
        config: the effective configuration of a run that is to begin from it.
        dataset: the data it names.
        folder: where the float run is kept; another configuration with the same float part finds it there.
        until: updates to make; default: up to the start of quantization.
        resume: go on with what is in the folder.
        callbacks: progress, warnings, callback.

    Raises:
        ConfigError: there is no step to train: no start step and no `until`, or one outside the run.
        RunError: the folder is in use, or holds something else, or went on beyond the step.
        Interrupted, NonFiniteLossError, DataError, ModelError: as in `run`.
    """
    step = _checked_until(config, until)
    float_config = fork_point_config(config)
    callbacks = callbacks or RunCallbacks()
    accelerator = make_accelerator(float_config)
    main = accelerator.is_main_process
    with folder.lock() if main else contextlib.nullcontext():
        if main:
            folder.check_claim(float_config, resume=resume)
        accelerator.wait_for_everyone()
        checkpoint = latest_checkpoint(folder.checkpoints, callbacks.warn)
        if checkpoint is None or checkpoint.step < step:
            components = build_components(float_config, dataset, accelerator, callbacks.progress)
            if main:
                folder.claim(float_config, resume=resume)
            state = initial_state(components, folder, callbacks.warn)
            train_in_folder(components, state, folder, callbacks=callbacks, until=step)
            accelerator.wait_for_everyone()
            checkpoint = latest_checkpoint(folder.checkpoints, callbacks.warn)
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
