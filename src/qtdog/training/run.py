"""One run: from a configuration to a finished folder, started or resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qtdog.core.config import Config
from qtdog.core.progress import Progress
from qtdog.data.dataset import DomainDataset
from qtdog.objectives.distill import Teacher
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record
from qtdog.training.build import compose, make_accelerator
from qtdog.training.checkpoint import Checkpoint
from qtdog.training.collapse import HealthWatch, chance_accuracy
from qtdog.training.components import Parts, RunState
from qtdog.training.finalize import final_network_, finish
from qtdog.training.loop import Doors, Track, Watcher, train
from qtdog.training.protocol import Problem, make_problem
from qtdog.training.resume import begin, save_state
from qtdog.training.shared_updates import Companion, Seat, joined
from qtdog.training.signals import StopRequest, interruption


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
    companions: Sequence[Companion] = (),
) -> dict[str, Any]:
    """Train, select and ship as `config` says, in `folder`; return the result.

    A finished folder of the same configuration is left as it is and its result is returned.

    Args:
        config: the effective configuration (`training.protocol.resolve`).
        dataset: the data it names.
        folder: where everything is written.
        resume: go on from the last whole checkpoint, if there is one.
        voice: how to speak to the user.
        fork_from: begin from this checkpoint of a float run (`training.fork.train_prefix`) unless the folder has one of
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
        ConfigError, DataError, ModelError: as in `training.build.compose`.
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
        with joined(companions, parts, state.step, voice.warn, fork_from) as seats:
            drive(parts, state, folder, problem, voice=voice, seats=seats)
        with StopRequest() as stop:
            final = final_network_(parts, state, check=_stop_check(parts, stop), progress=voice.quantizing)
        if main:
            finish(parts, state, final, (problem, dataset), folder)
        accelerator.wait_for_everyone()
    result = folder.read_result()
    assert result is not None
    return result


def drive(
    parts: Parts,
    state: RunState,
    folder: RunFolder,
    problem: Problem,
    *,
    voice: Voice,
    until: int | None = None,
    seats: Sequence[Seat] = (),
) -> None:
    """Train from where `state` stands to the end, or to step `until`, with all that belongs to a run's folder.

    Args:
        parts: of the run.
        state: where it stands.
        folder: where it writes.
        problem: what it learns.
        voice: how to speak to the user.
        until: updates made at the end; None for all.
        seats: runs that come along (`training.shared_updates.joined`).

    Raises:
        Interrupted, NonFiniteLossError, CollapseError: as in `training.loop.train`.
    """
    shown = parts.config
    if until is not None:
        shown = shown.model_copy(update={"train": shown.train.model_copy(update={"steps": until})})
    watching = voice.watcher(shown, state.step) if voice.watcher else contextlib.nullcontext(Silent())
    with StopRequest() as stop, watching as watcher:
        main = _track(Seat(parts, state, folder), problem, stop, watcher, voice.warn)
        companions = [_track(seat, problem, stop, Silent(), _ignore) for seat in seats]
        with folder.diagnosis():
            train(main, until, companions)


def _track(seat: Seat, problem: Problem, stop: StopRequest, watcher: Watcher, warn: Callable[[str], None]) -> Track:
    parts, folder = seat.parts, seat.folder
    main = parts.accelerator.is_main_process
    if main:
        folder.rewrite_metrics(seat.state.lines)
    doors = Doors(
        save=lambda state: save_state(parts, folder, state),
        keep_line=folder.append_metrics if main else _ignore,
        check=_stop_check(parts, stop),
        watcher=watcher,
        health=_health(parts, problem, warn),
    )
    return Track(parts, seat.state, doors)


def _ignore(what: object) -> None:
    """Tell nobody."""


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
