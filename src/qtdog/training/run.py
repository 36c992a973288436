"""One run: from a configuration to a finished folder, started or resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qtdog.core.config import Config
from qtdog.core.errors import ConfigError, RunError
from qtdog.core.progress import Progress, RunCallback
from qtdog.data.dataset import DomainDataset
from qtdog.objectives.distill import Teacher
from qtdog.runs.folder import RunFolder
from qtdog.training.build import build_components, make_accelerator
from qtdog.training.checkpoint import Checkpoint, latest_checkpoint, restore, save_state
from qtdog.training.collapse import HealthWatch, chance_accuracy
from qtdog.training.components import Components, RunState
from qtdog.training.finalize import final_network_, write_result
from qtdog.training.fork import begin_fork_, fork_point_config
from qtdog.training.loop import Doors, Track, train
from qtdog.training.protocol import DomainProtocol, make_protocol
from qtdog.training.shared_updates import Seat, SharedRun, joined
from qtdog.training.signals import StopRequest, interruption


@dataclass(frozen=True)
class RunCallbacks:
    """What a run calls while it lasts.

    Attributes:
        callback: is told of steps and evaluations; None for none.
        progress: of decoding images.
        warn: is told what went wrong without stopping the run.
        quantizing: of quantization after training.
    """

    callback: RunCallback | None = None
    progress: Progress = None
    warn: Callable[[str], None] = print
    quantizing: Progress = None


def run(
    config: Config,
    dataset: DomainDataset,
    folder: RunFolder,
    *,
    resume: bool = False,
    callbacks: RunCallbacks | None = None,
    fork_from: Checkpoint | None = None,
    teacher: Teacher | None = None,
    companions: Sequence[SharedRun] = (),
) -> dict[str, Any]:
    """Train, select and ship as `config` says, in `folder`; return the result.

    A finished folder of the same configuration is left as it is and its result is returned.

    Args:
        config: the effective configuration (`training.protocol.resolve`).
        dataset: the data it names.
        folder: where everything is written.
        resume: go on from the last whole checkpoint, if there is one.
        callbacks: progress, warnings, callback.
        fork_from: begin from this checkpoint of a float run (`train_fork_point`) unless the folder has one of
            its own; the outcome is the same, bit for bit, but for the time that its training took.
        teacher: images → logits, if the configuration names one (`ensemble.teacher.load_teacher`).
        companions: unfinished runs that differ in their averager alone; those that stand where this one begins are
            trained along and left at their last checkpoint, from which `run` finishes them.

    Raises:
        RunError: the folder is in use, or holds another or an unfinished run; the disk is full; or `fork_from` is none
            that this run could begin from.
        Interrupted: a signal asked to stop; the state was saved.
        NonFiniteLossError: the loss became NaN; the last good state was saved.
        CollapseError: a quantized network fell to chance; the state was saved, and `diagnosis.json` says more.
        ConfigError, DataError, ModelError: as in `training.build.build_components`.
    """
    callbacks = callbacks or RunCallbacks()
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    with folder.lock() if main else contextlib.nullcontext():
        if main:
            folder.claim(config, resume=resume)
            folder.keep_skipped(dataset.skipped)
        accelerator.wait_for_everyone()
        if (result := folder.read_result()) is not None and folder.model_file.is_file():
            return result
        protocol = make_protocol(config, dataset)
        parts = build_components(config, dataset, protocol, accelerator, callbacks.progress, teacher=teacher)
        state = initial_state(parts, folder, callbacks.warn, fork_from)
        with joined(companions, parts, state.step, callbacks.warn, fork_from) as seats:
            drive(parts, state, folder, protocol, callbacks=callbacks, seats=seats)
        with StopRequest() as stop:
            final = final_network_(parts, state, check=_stop_check(parts, stop), progress=callbacks.quantizing)
        if main:
            write_result(parts, state, final, (protocol, dataset), folder)
        accelerator.wait_for_everyone()
    result = folder.read_result()
    assert result is not None
    return result


def drive(
    parts: Components,
    state: RunState,
    folder: RunFolder,
    protocol: DomainProtocol,
    *,
    callbacks: RunCallbacks,
    until: int | None = None,
    seats: Sequence[Seat] = (),
) -> None:
    """Train from where `state` stands to the end, or to step `until`, with all that belongs to a run's folder.

    Args:
        parts: of the run.
        state: where it stands.
        folder: where it writes.
        protocol: what it learns.
        callbacks: progress, warnings, callback.
        until: updates made at the end; None for all.
        seats: runs that come along (`training.shared_updates.joined`).

    Raises:
        Interrupted, NonFiniteLossError, CollapseError: as in `training.loop.train`.
    """
    shown = parts.config
    if until is not None:
        shown = shown.model_copy(update={"train": shown.train.model_copy(update={"steps": until})})
    callback = callbacks.callback or RunCallback()
    with StopRequest() as stop, contextlib.ExitStack() as ending:
        callback.on_start(shown, state.step)
        ending.callback(callback.on_end)
        main = _track(Seat(parts, state, folder), protocol, stop, callback, callbacks.warn)
        companions = [_track(seat, protocol, stop, RunCallback(), _ignore) for seat in seats]
        with folder.diagnosis():
            train(main, until, companions)


def initial_state(
    parts: Components, folder: RunFolder, warn: Callable[[str], None], fork_from: Checkpoint | None = None
) -> RunState:
    """Return where to go on: at the folder's last whole checkpoint, else at `fork_from`, else at the start.

    Raises:
        RunError: the checkpoint does not fit (`training.checkpoint.restore`, `training.fork.begin_fork_`).
    """
    checkpoint = latest_checkpoint(folder.checkpoints, warn)
    if checkpoint is not None:
        return restore(parts, checkpoint, folder)
    return RunState() if fork_from is None else begin_fork_(parts, fork_from)


def _track(
    seat: Seat, protocol: DomainProtocol, stop: StopRequest, callback: RunCallback, warn: Callable[[str], None]
) -> Track:
    parts, folder = seat.parts, seat.folder
    main = parts.accelerator.is_main_process
    if main:
        folder.rewrite_metrics(seat.state.lines)
    doors = Doors(
        save=lambda state: save_state(parts, folder, state),
        keep_line=folder.append_metrics if main else _ignore,
        check=_stop_check(parts, stop),
        callback=callback,
        health=_health(parts, protocol, warn),
    )
    return Track(parts, seat.state, doors)


def _ignore(what: object) -> None:
    """Tell nobody."""


def _health(parts: Components, protocol: DomainProtocol, warn: Callable[[str], None]) -> HealthWatch:
    sets = list(protocol.selection_sets().values())
    chance = chance_accuracy(parts.batches.class_index, sets, parts.network.classifier.out_features)
    return HealthWatch(parts.config, chance, warn)


def _stop_check(parts: Components, stop: StopRequest) -> Callable[[], None]:
    return stop.check if parts.accelerator.num_processes == 1 else lambda: _check_together(parts, stop)


def _check_together(parts: Components, stop: StopRequest) -> None:
    """Stop all processes behind the same step, whichever of them got the signal."""
    mine = torch.tensor(float(stop.signal or 0), device=parts.accelerator.device)
    signals = parts.accelerator.gather(mine.reshape(1))
    assert isinstance(signals, torch.Tensor)
    number = int(signals.max().item())
    if number:
        raise interruption(number)


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
        callbacks: how to speak to the user.

    Raises:
        ConfigError: there is no step to train: no start step and no `until`, or one outside the run.
        RunError: the folder is in use, or holds something else, or went on beyond the step.
        Interrupted, NonFiniteLossError, DataError, ModelError: as in `run`.
    """
    step = _checked_until(config, until)
    plan = fork_point_config(config)
    callbacks = callbacks or RunCallbacks()
    accelerator = make_accelerator(plan)
    main = accelerator.is_main_process
    with folder.lock() if main else contextlib.nullcontext():
        if main:
            folder.claim(plan, resume=resume)
        accelerator.wait_for_everyone()
        checkpoint = latest_checkpoint(folder.checkpoints, callbacks.warn)
        if checkpoint is None or checkpoint.step < step:
            protocol = make_protocol(plan, dataset)
            parts = build_components(plan, dataset, protocol, accelerator, callbacks.progress)
            drive(
                parts, initial_state(parts, folder, callbacks.warn), folder, protocol, callbacks=callbacks, until=step
            )
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
