"""One run: from a configuration to a finished folder, started or resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from qtdog.core.config import Config
from qtdog.core.errors import RunError
from qtdog.data.cache import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.objectives.distill import Teacher
from qtdog.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from qtdog.training.compose import compose, make_accelerator
from qtdog.training.final import final_network_
from qtdog.training.fork_state import begin_fork_
from qtdog.training.health import HealthWatch, chance_accuracy
from qtdog.training.loop import Doors, Watcher, train
from qtdog.training.optimizer_state import flatten_optimizer, plain_names, restore_optimizer_
from qtdog.training.parts import Parts
from qtdog.training.problem import Problem, make_problem
from qtdog.training.records import Record
from qtdog.training.result import finish
from qtdog.training.run_folder import RunFolder
from qtdog.training.signals import StopRequest, interruption
from qtdog.training.state import RunState


class Silent:
    """A watcher that says nothing."""

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """Ignore an update."""

    def on_record(self, record: Record) -> None:
        """Ignore an evaluation."""


@dataclass(frozen=True)
class Voice:
    """How a run speaks to its user.

    Attributes:
        watcher: is told of steps and evaluations; `None` for silence.
        progress: of decoding images.
        warn: is told what went wrong without stopping the run.
        quantizing: of quantization after training.
    """

    watcher: Callable[[Config, int], contextlib.AbstractContextManager[Watcher]] | None = None
    progress: Progress = None
    warn: Callable[[str], None] = print
    quantizing: Progress = None


def run(
    config: Config,
    dataset: DomainDataset,
    folder: RunFolder,
    *,
    resume: bool = False,
    voice: Voice | None = None,
    fork_from: Checkpoint | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Train, select and ship as `config` says, in `folder`; return the result.

    A finished folder of the same configuration is left as it is and its result is returned.

    Args:
        config: the effective configuration (`training.problem.resolve`).
        dataset: the data it names.
        folder: where everything is written.
        resume: go on from the last whole checkpoint, if there is one.
        voice: how to speak to the user.
        fork_from: begin from this checkpoint of a float run (`training.fork.train_prefix`) unless the folder has one of
            its own; the outcome is the same, bit for bit, but for the time that its training took.
        teacher: images → logits, if the configuration names one (`ensemble.teach.open_teacher`).

    Raises:
        RunError: the folder is in use, or holds another or an unfinished run; the disk is full; or `fork_from` is none
            that this run could begin from.
        Interrupted: a signal asked to stop; the state was saved.
        NonFiniteLossError: the loss became NaN; the last good state was saved.
        CollapseError: a quantized network fell to chance; the state was saved, and `diagnosis.json` says more.
        ConfigError, DataError, ModelError: as in `training.compose.compose`.
    """
    voice = voice or Voice()
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process
    with folder.lock() if main else contextlib.nullcontext():
        if main:
            folder.claim(config, resume=resume)
            folder.keep_skipped(dataset.skipped)
        accelerator.wait_for_everyone()
        if (result := folder.read_result()) is not None and folder.model_file.is_file():
            return result
        problem = make_problem(config, dataset)
        parts = compose(config, dataset, problem, accelerator, voice.progress, teacher=teacher)
        state = begin(parts, folder, voice.warn, fork_from)
        drive(parts, state, folder, problem, voice=voice)
        with StopRequest() as stop:
            final = final_network_(parts, state, check=_stop_check(parts, stop), progress=voice.quantizing)
        if main:
            finish(parts, state, final, (problem, dataset), folder)
        accelerator.wait_for_everyone()
    result = folder.read_result()
    assert result is not None
    return result


def begin(
    parts: Parts, folder: RunFolder, warn: Callable[[str], None], fork_from: Checkpoint | None = None
) -> RunState:
    """Return where to go on: at the folder's last whole checkpoint, else at `fork_from`, else at the start.

    Raises:
        RunError: the checkpoint does not fit (`restore`, `training.fork_state.begin_fork_`).
    """
    checkpoint = latest_checkpoint(folder.checkpoints, warn)
    if checkpoint is not None:
        return restore(parts, checkpoint, folder)
    return RunState() if fork_from is None else begin_fork_(parts, fork_from)


def drive(
    parts: Parts, state: RunState, folder: RunFolder, problem: Problem, *, voice: Voice, until: int | None = None
) -> None:
    """Train from where `state` stands to the end, or to step `until`, with all that belongs to a run's folder.

    Raises:
        Interrupted, NonFiniteLossError, CollapseError: as in `training.loop.train`.
    """
    if parts.accelerator.is_main_process:
        folder.rewrite_metrics(state.lines)
    shown = parts.config
    if until is not None:
        shown = shown.model_copy(update={"train": shown.train.model_copy(update={"steps": until})})
    watching = voice.watcher(shown, state.step) if voice.watcher else contextlib.nullcontext(Silent())
    with StopRequest() as stop, watching as watcher:
        doors = replace(_doors(parts, folder, stop, watcher), health=_health(parts, problem, voice.warn))
        with folder.diagnosis():
            train(parts, state, doors, until)


def _doors(parts: Parts, folder: RunFolder, stop: StopRequest, watcher: Watcher) -> Doors:
    main = parts.accelerator.is_main_process
    return Doors(
        save=lambda state: save_state(parts, folder, state),
        keep_line=folder.append_metrics if main else lambda line: None,
        check=_stop_check(parts, stop),
        watcher=watcher,
    )


def _health(parts: Parts, problem: Problem, warn: Callable[[str], None]) -> HealthWatch:
    sets = list(problem.selection_sets().values())
    chance = chance_accuracy(parts.batches.class_index, sets, parts.network.classifier.out_features)
    return HealthWatch(parts.config, chance, warn)


def _stop_check(parts: Parts, stop: StopRequest) -> Callable[[], None]:
    return stop.check if parts.accelerator.num_processes == 1 else lambda: _check_together(parts, stop)


def _check_together(parts: Parts, stop: StopRequest) -> None:
    """Stop all processes behind the same step, whichever of them got the signal."""
    mine = torch.tensor(float(stop.signal or 0), device=parts.accelerator.device)
    signals = parts.accelerator.gather(mine.reshape(1))
    assert isinstance(signals, torch.Tensor)
    number = int(signals.max().item())
    if number:
        raise interruption(number)


def save_state(parts: Parts, folder: RunFolder, state: RunState) -> None:
    """Write a checkpoint of everything that the run needs to go on."""
    state.saved_step = state.step
    if not parts.accelerator.is_main_process:
        return
    moments, groups = flatten_optimizer(parts.optimizer, plain_names(parts.network, parts.objective))
    averaged, averager = parts.averager.state()
    tensors = {"network": parts.network.state_dict(), "optimizer": moments}
    tensors |= {"objective": parts.objective.state_dict(), "averager": averaged}
    if state.selected is not None:
        tensors["selected"] = state.selected
    enabled = parts.quantizer is not None and parts.quantizer.enabled
    extra = {"optimizer_groups": groups, "quantizer_enabled": enabled, "averager": averager}
    extra["config"] = parts.config.model_dump(mode="json")
    write_checkpoint(folder.checkpoints, Checkpoint(state.step, tensors, state.to_json() | extra))


def restore(parts: Parts, checkpoint: Checkpoint, folder: RunFolder) -> RunState:
    """Put a checkpoint of the run in `folder` into the parts and return where it stood.

    Raises:
        RunError: the checkpoint does not fit the network or the optimizer.
    """
    try:
        parts.network.load_state_dict(checkpoint.tensors["network"])
        parts.objective.load_state_dict(checkpoint.tensors["objective"])
        parts.averager.restore(checkpoint.tensors["averager"], checkpoint.state["averager"])
        names = plain_names(parts.network, parts.objective)
        moments, groups = checkpoint.tensors["optimizer"], checkpoint.state["optimizer_groups"]
        restore_optimizer_(parts.optimizer, names, moments, groups)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise RunError(f"the checkpoint in {folder.checkpoints} does not fit this run: {error}") from error
    if parts.quantizer is not None:
        parts.quantizer.set_enabled(checkpoint.state["quantizer_enabled"])
    state = RunState.from_json(checkpoint.step, checkpoint.state)
    state.selected = checkpoint.tensors.get("selected")
    return state
