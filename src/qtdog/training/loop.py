"""The training loop, on one page.

Order of one turn: evaluate if due, checkpoint if due, quantize if it is the step, update. An interruption anywhere
leaves through the same door: a checkpoint of the state between two updates.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtdog.conversion.inspect import LayerHealth, layer_health, worst
from qtdog.core.errors import CollapseError, Interrupted, NonFiniteLossError
from qtdog.core.progress import RunCallback
from qtdog.core.random import derive
from qtdog.data.loader import Batch
from qtdog.objectives.base import DomainBatch
from qtdog.runs.record import Record, SourceRecord
from qtdog.runs.selection import select
from qtdog.training.averagers import snapshot, swapped
from qtdog.training.batch_norm import fit_batch_norm_, take_batch_norm_of_the_first_process_
from qtdog.training.components import Components, RunState
from qtdog.training.step_rules import Update, keep_classifier_gradients_, lr_factor


@dataclass(frozen=True)
class Doors:
    """Where the loop meets the world.

    Attributes:
        save: write a checkpoint of the state.
        keep_line: write one line of metrics.
        check: raise Interrupted if the run is asked to stop.
        callback: is told of steps and evaluations.
        health: looks at the grids at each evaluation; may raise CollapseError.
    """

    save: Callable[[RunState], None]
    keep_line: Callable[[dict], None]
    check: Callable[[], None]
    callback: RunCallback
    health: Callable[[list[LayerHealth], list[SourceRecord]], None] = lambda layers, records: None


@dataclass(frozen=True)
class Track:
    """One run on its way: what it is made of, where it stands, and its doors to the world."""

    parts: Components
    state: RunState
    doors: Doors

    def evaluate(self, known: Record | None = None) -> Record | None:
        """Evaluate the present step, unless that was done before an interruption.

        Args:
            known: what the weights as they are came to at this step, if that was measured.

        Returns:
            the same, if it is known now.
        """
        if self.state.evaluated_step == self.state.step:
            return known
        return _evaluate(self.parts, self.state, self.doors, known)

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        self.doors.save(self.state)

    def count(self, loss: float, seconds: float) -> None:
        """Take note of one update."""
        self.state.trained_s += seconds
        self.state.step += 1
        if self.parts.selectable:
            self.parts.averager.after_step(self.state.step, self.parts.network)
        self.state.add_loss(loss)


def train(run: Track, until: int | None = None, companions: Sequence[Track] = ()) -> None:
    """Train from `run.state.step` to the end of the configuration; state and network are changed in place.

    With `until` it ends there, with a checkpoint of just the state that training on would have had at that step.

    Args:
        run: that trains.
        until: updates made at the end.
        companions: runs that differ in their averager alone and stand at the same step. They take every update for
            theirs and never stop the run: a companion that collapses falls behind, at its last checkpoint.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was written first.
        NonFiniteLossError: the loss is NaN or infinite; the last good state was kept.
        CollapseError: a quantized network fell to chance; the state was kept.
    """
    # Companions come first. Killed between two saves, all still have a checkpoint of the step where the run goes on.
    tracks = [*companions, run]
    try:
        _train(tracks, run.parts.config.train.steps if until is None else until)
    except (Interrupted, CollapseError):
        _save(tracks)
        raise
    except NonFiniteLossError:
        if all(torch.isfinite(parameter).all() for parameter in run.parts.network.parameters()):
            _save(tracks)
        raise


def _train(tracks: list[Track], last: int) -> None:
    parts, state, doors = tracks[-1].parts, tracks[-1].state, tracks[-1].doors
    plan = parts.config.train
    save_every = plan.checkpoint_every or plan.eval_every
    parts.network.train()
    with contextlib.closing(parts.batches.stream(state.step, last)) as batches:
        while True:
            if state.step and (state.step == plan.steps or state.step % plan.eval_every == 0):
                _evaluate_all(tracks)
            if state.saved_step < state.step and (state.step == last or state.step % save_every == 0):
                _save(tracks)
            if state.step == last:
                return
            started = time.perf_counter()
            batch = next(batches)
            begin_step(parts, state.step)
            loss = update(parts, batch, state.step)
            seconds = time.perf_counter() - started
            for track in tracks:
                track.count(loss, seconds)
            doors.callback.on_step(state.step, loss, len(batch.labels) * parts.accelerator.num_processes)
            doors.check()


def _evaluate_all(tracks: list[Track]) -> None:
    known = None
    for track in tracks[:-1]:
        try:
            known = track.evaluate(known)
        except CollapseError:
            tracks.remove(track)  # training by itself it will say so
    tracks[-1].evaluate(known)


def _save(tracks: Sequence[Track]) -> None:
    for track in tracks:
        track.save()


def begin_step(parts: Components, step: int) -> None:
    """Set the learning rates of one step, start quantization if it is the step, prepare its quantizers."""
    config = parts.config
    factor = lr_factor(config.optimizer.schedule, step, decay_from=config.decay_from, steps=config.train.steps)
    for group, lr in zip(parts.optimizer.param_groups, parts.base_lrs, strict=True):
        group["lr"] = lr * factor
    start = config.start_step
    if parts.quantizer is None or start is None or step < start:
        return
    if step == start:
        parts.quantizer.enable()
    # the same on all processes, so that they perturb the weights alike
    seed = derive(config.train.seed, "weights", step)
    parts.quantizer.begin_step(seed, (step - start) / (config.train.steps - start))


def update(parts: Components, batch: Batch, step: int) -> float:
    """Make one update on `batch` and return its loss.

    Raises:
        NonFiniteLossError: before anything moved.
    """
    accelerator = parts.accelerator
    seed = derive(parts.config.train.seed, "model", step, accelerator.process_index)
    images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
    moved = DomainBatch(images, labels, batch.sizes, step)

    def backward() -> Tensor:
        # Dropout, Mixup and their kin draw from the stream of this step: a resumed run draws the same, and so does a
        # step rule that passes over the batch twice.
        torch.manual_seed(seed)
        loss = parts.objective(parts.view, moved)
        shown = accelerator.reduce(loss.detach(), reduction="mean")
        assert isinstance(shown, Tensor)
        if not torch.isfinite(shown):
            raise NonFiniteLossError(_advice(parts, step, shown.item()))
        accelerator.backward(loss)
        if step < parts.config.train.probe_steps:
            keep_classifier_gradients_(parts.network, parts.objective)
        return shown

    return parts.step_rule(Update(backward, parts.optimizer, parts.network)).item()


def _advice(parts: Components, step: int, loss: float) -> str:
    rate = parts.config.optimizer.lr
    text = f"the training loss became {loss} at step {step + 1}; the state before it is kept in the run folder."
    return f"{text} Start anew with a lower learning rate (--lr {rate / 5:g}; it was {rate:g}), or look at the data."


def _evaluate(parts: Components, state: RunState, doors: Doors, known: Record | None) -> Record | None:
    averaged = parts.averager.evaluated()
    with swapped(parts.network, averaged):
        if averaged is not None:
            fit_batch_norm_(parts)
        else:
            take_batch_norm_of_the_first_process_(parts)
        record = known if averaged is None else None
        if record is None:
            record = parts.evaluate(state.step, parts.selectable, state.mean_loss, doors.check)
        layers = layer_health(parts.network)
        line = record.to_json() | {"trained_s": round(state.trained_s, 3), "health": worst(layers)}
        state.add_line(line)
        if select(parts.config.train.selection, state.records) == state.step:
            state.selected = snapshot(parts.network)
    parts.averager.after_evaluation(state.step, record.seen.source_loss)
    doors.keep_line(line)
    doors.health(layers, [record.seen for record in state.records])
    doors.callback.on_record(record)
    return record if averaged is None else known
