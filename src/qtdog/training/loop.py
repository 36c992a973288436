"""The training loop, on one page.

Order of one turn: evaluate if due, checkpoint if due, quantize if it is the step, update. An interruption anywhere
leaves through the same door: a checkpoint of the state between two updates.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qtdog.core.errors import Interrupted, NonFiniteLossError
from qtdog.core.random import derive
from qtdog.data.loader import Batch
from qtdog.objectives.objective import DomainOutputs
from qtdog.training.parts import Parts
from qtdog.training.records import Record
from qtdog.training.select import select
from qtdog.training.state import RunState


class Watcher(Protocol):
    """Who is told how the run goes (a progress bar, a log)."""

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """One update was made."""
        ...

    def on_record(self, record: Record) -> None:
        """One evaluation was made."""
        ...


@dataclass(frozen=True)
class Doors:
    """Where the loop meets the world.

    Attributes:
        save: write a checkpoint of the state.
        keep_line: write one line of metrics.
        check: raise Interrupted if the run is asked to stop.
        watcher: is told of steps and evaluations.
    """

    save: Callable[[RunState], None]
    keep_line: Callable[[dict], None]
    check: Callable[[], None]
    watcher: Watcher


def train(parts: Parts, state: RunState, doors: Doors) -> None:
    """Train from `state.step` to the end of the configuration; `state` and the network are changed in place.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint was written first.
        NonFiniteLossError: the loss is NaN or infinite; the last good state was kept.
    """
    try:
        _train(parts, state, doors)
    except Interrupted:
        doors.save(state)
        raise
    except NonFiniteLossError:
        if all(torch.isfinite(parameter).all() for parameter in parts.network.parameters()):
            doors.save(state)
        raise


def _train(parts: Parts, state: RunState, doors: Doors) -> None:
    plan = parts.config.train
    save_every = plan.checkpoint_every or plan.eval_every
    parts.network.train()
    with contextlib.closing(parts.batches.stream(state.step, plan.steps)) as batches:
        while True:
            at_end = state.step == plan.steps
            if state.evaluated_step < state.step and (at_end or state.step % plan.eval_every == 0):
                _evaluate(parts, state, doors)
            if state.saved_step < state.step and (at_end or state.step % save_every == 0):
                doors.save(state)
            if at_end:
                return
            if parts.quantizer is not None and state.step == parts.config.start_step:
                parts.quantizer.enable()
            started = time.perf_counter()
            batch = next(batches)
            loss = update(parts, batch, state.step)
            state.trained_s += time.perf_counter() - started
            state.step += 1
            state.add_loss(loss)
            doors.watcher.on_step(state.step, loss, len(batch.labels) * parts.accelerator.num_processes)
            doors.check()


def update(parts: Parts, batch: Batch, step: int) -> float:
    """Make one update on `batch` and return its loss.

    Raises:
        NonFiniteLossError: before anything moved.
    """
    accelerator = parts.accelerator
    # Dropout and its kin draw from the stream of this step, so that a resumed run draws the same.
    torch.manual_seed(derive(parts.config.train.seed, "model", step, accelerator.process_index))
    images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)

    def backward() -> Tensor:
        features, logits = parts.model(images)
        split = zip(*(tensor.split(batch.sizes) for tensor in (features, logits, labels)), strict=True)
        loss = parts.objective([DomainOutputs(*domain) for domain in split])
        shown = accelerator.reduce(loss.detach(), reduction="mean")
        assert isinstance(shown, Tensor)
        if not torch.isfinite(shown):
            raise NonFiniteLossError(_advice(parts, step, shown.item()))
        accelerator.backward(loss)
        return shown

    return parts.step_rule(backward, parts.optimizer).item()


def _advice(parts: Parts, step: int, loss: float) -> str:
    rate = parts.config.optimizer.lr
    text = f"the training loss became {loss} at step {step + 1}; the state before it is kept in the run folder."
    return f"{text} Start anew with a lower learning rate (--lr {rate / 5:g}; it was {rate:g}), or look at the data."


def _evaluate(parts: Parts, state: RunState, doors: Doors) -> None:
    record = parts.evaluate(state.step, parts.selectable, state.mean_loss, doors.check)
    line = record.to_json() | {"trained_s": round(state.trained_s, 3)}
    state.add_line(line)
    if select(parts.config.train.selection, state.records) == state.step:
        state.selected = parts.averager.weights(parts.network)
    doors.keep_line(line)
    doors.watcher.on_record(record)
