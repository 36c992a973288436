"""The training loop of one run, on one page.

Order of one turn: evaluate if due, save a checkpoint if due, start quantization if it is the step, update. An
interruption anywhere ends in a checkpoint of the state between two updates.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qtdog.conversion.inspect import LayerHealth, layer_health, worst
from qtdog.core.config import Config
from qtdog.core.errors import CollapseError, ConfigError, Interrupted, NonFiniteLossError
from qtdog.core.progress import RunCallback
from qtdog.core.random import derive
from qtdog.data.loader import Batch, CudaAhead
from qtdog.objectives.base import DomainBatch
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record, SourceRecord
from qtdog.runs.selection import select
from qtdog.training.averagers import snapshot, swapped
from qtdog.training.checkpoint import save_state
from qtdog.training.components import Components, RunState
from qtdog.training.evaluation import fit_batch_norm_, take_batch_norm_of_the_first_process_
from qtdog.training.loss_scale import GradientOverflow
from qtdog.training.step_rules import Update, keep_classifier_gradients_, lr_factor

READ_EVERY = 20
"""Updates between two readings of the loss where a reading waits for the device (a GPU)."""


def nothing(*args: object) -> None:
    """The hook that does nothing: no interruption, no check of the quantizers' health."""


@dataclass
class TrainingRun:
    """One run while it trains.

    Attributes:
        components: what it is made of.
        state: where it stands; changed in place.
        folder: gets its metrics and checkpoints; None to write nothing.
        check_health: called with the health of quantized layers and the evaluations so far; may raise CollapseError.
        plain_record: the last evaluation, if it was of the weights as they are; None if it was of an average.
        losses: of the last updates, on the device, not read yet.
        newest_loss: of the last update, on the device.
        last_loss: the newest that was read.
    """

    components: Components
    state: RunState
    folder: RunFolder | None = None
    check_health: Callable[[list[LayerHealth], list[SourceRecord]], None] = nothing
    plain_record: Record | None = None
    losses: list[Tensor] = field(default_factory=list)
    newest_loss: Tensor | None = None
    last_loss: float = math.nan

    def after_step(self, loss: Tensor, seconds: float) -> None:
        """Count one update of the network, which took so long.

        Raises:
            NonFiniteLossError: one of the last losses is NaN or infinite.
        """
        self.state.trained_s += seconds
        self.state.step += 1
        if self.components.selectable or self.components.averager.COUNTS_FLOAT:
            self.components.averager.after_step(self.state.step, self.components.network)
        self.newest_loss = loss
        self.losses.append(loss)
        if loss.device.type == "cpu" or len(self.losses) == READ_EVERY:
            self.read_losses()

    def read_losses(self) -> None:
        """Count the losses that lie on the device: one wait for all of them.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        if not self.losses:
            return
        started = time.perf_counter()
        values = torch.stack(self.losses).tolist()  # waits until the updates are done
        self.state.trained_s += time.perf_counter() - started
        first = self.state.step - len(values)
        self.losses.clear()
        for step, value in enumerate(values, start=first):
            if not math.isfinite(value):
                raise NonFiniteLossError(_advice(self.components, step, value))
            self.state.add_loss(value)
        self.last_loss = values[-1]

    def evaluate(self, check_interrupt: Callable[[], None] = nothing, plain_record: Record | None = None) -> Record:
        """Evaluate the present step, keep the weights if selection prefers them, and write a line of metrics.

        Args:
            check_interrupt: called before each batch of images; may raise to break off.
            plain_record: the evaluation of the weights as they are, if it is known.

        Raises:
            CollapseError: a quantized network fell to chance.
            NonFiniteLossError: a loss since the last reading is NaN or infinite.
        """
        components, state = self.components, self.state
        self.read_losses()
        averaged = components.averager.evaluated()
        with swapped(components.network, averaged):
            if averaged is not None:
                fit_batch_norm_(components)
            else:
                take_batch_norm_of_the_first_process_(components)
            record = plain_record if averaged is None else None
            if record is None:
                record = components.evaluate(state.step, components.selectable, state.mean_loss, check_interrupt)
            layers = layer_health(components.network)
            line = record.to_json() | {"trained_s": round(state.trained_s, 3), "health": worst(layers)}
            state.add_line(line)
            if select(components.config.train.selection, state.records) == state.step:
                state.selected = snapshot(components.network)
        self.plain_record = record if averaged is None else None
        components.averager.after_evaluation(state.step, record.seen.source_loss)
        if self.folder is not None and components.accelerator.is_main_process:
            self.folder.append_metrics(line)
        self.check_health(layers, [record.seen for record in state.records])
        return record

    def save(self) -> None:
        """Write a checkpoint of the present step.

        Raises:
            NonFiniteLossError: a loss since the last reading is NaN or infinite; nothing is written then.
        """
        self.read_losses()
        if self.folder is not None:
            save_state(self.components, self.folder, self.state)
        self.state.saved_step = self.state.step


def evaluation_is_due(config: Config, state: RunState) -> bool:
    """Return whether the present step is one that is evaluated, and was not yet."""
    plan, step = config.train, state.step
    return state.evaluated_step != step and step > 0 and (step == plan.steps or step % plan.eval_every == 0)


def train(
    run: TrainingRun,
    *,
    until: int | None = None,
    callback: RunCallback | None = None,
    check_interrupt: Callable[[], None] = nothing,
) -> None:
    """Train from `run.state.step` to the end of the configuration; state and network are changed in place.

    With `until` it ends there, with a checkpoint of just the state that training on would have had at that step.

    Args:
        run: that trains.
        until: updates made at the end.
        callback: is called with steps, evaluations and checkpoints.
        check_interrupt: called after each update and while evaluating; raises Interrupted if the run is asked to stop.

    Raises:
        Interrupted: the run was asked to stop; a checkpoint was written first.
        NonFiniteLossError: the loss is NaN or infinite; the last good state was kept.
        CollapseError: a quantized network fell to chance; the state was kept.
        ConfigError: batch norm learns its statistics, and the batch has one value per channel.
    """
    callback = callback or RunCallback()
    try:
        _train(run, run.components.config.train.steps if until is None else until, callback, check_interrupt)
    except (Interrupted, CollapseError):
        _save(run, callback)
        raise
    except NonFiniteLossError:
        if all(torch.isfinite(parameter).all() for parameter in run.components.network.parameters()):
            _save(run, callback)
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # batch norm's
            raise
        size = run.components.config.data.batch_size
        raise ConfigError(
            f"batch norm learns its statistics, and a batch of data.batch_size {size} gives it one value per channel: "
            "take a larger batch or larger images, or --set model.freeze_bn=true"
        ) from error


def _train(run: TrainingRun, last: int, callback: RunCallback, check_interrupt: Callable[[], None]) -> None:
    components, state, plan = run.components, run.state, run.components.config.train
    save_every = plan.checkpoint_every or plan.eval_every
    components.network.train()
    device = components.accelerator.device
    ahead = CudaAhead(device) if device.type == "cuda" else None
    with contextlib.closing(components.batches.stream(state.step, last, ahead)) as batches:
        while True:
            if evaluation_is_due(components.config, state):
                callback.on_record(run.evaluate(check_interrupt))
            if state.saved_step < state.step and (state.step == last or state.step % save_every == 0):
                _save(run, callback)
            if state.step == last:
                return
            started = time.perf_counter()
            batch = next(batches)
            begin_step(components, state.step)
            loss = update(components, batch, state.step)
            run.after_step(loss, time.perf_counter() - started)
            callback.on_step(state.step, run.last_loss, len(batch.labels) * components.accelerator.num_processes)
            check_interrupt()


def _save(run: TrainingRun, callback: RunCallback) -> None:
    callback.on_save(run.state.step)
    run.save()


def begin_step(components: Components, step: int) -> None:
    """Set the learning rates of one step, start quantization if it is the step, prepare its quantizers."""
    config = components.config
    factor = lr_factor(config.optimizer.schedule, step, decay_from=components.decay_from, steps=config.train.steps)
    for group, lr in zip(components.optimizer.param_groups, components.base_lrs, strict=True):
        group["lr"] = lr * factor
    start = components.start_step
    if components.quantizer is None or start is None or step < start:
        return
    if step == start:
        averaged = components.averager.hand_over()
        if averaged is not None:
            components.network.load_state_dict(averaged, strict=False)
            fit_batch_norm_(components)
        components.quantizer.enable()
    # the same on all processes, so that they perturb the weights alike
    seed = derive(config.train.seed, "weights", step)
    components.quantizer.begin_step(seed, (step - start) / (config.train.steps - start))


def update(components: Components, batch: Batch, step: int) -> Tensor:
    """Make one update on `batch` and return its loss, a scalar on the device, where nothing waits for it.

    Under float16 an update whose scaled gradients overflow is left out.

    Raises:
        NonFiniteLossError: before anything moved, if the device is the CPU; elsewhere `TrainingRun` sees it later.
            Gradients that overflow float16 without a scale.
    """
    accelerator = components.accelerator
    seed = derive(components.config.train.seed, "model", step, accelerator.process_index)
    there = batch.on(accelerator.device)
    moved = DomainBatch(there.images, there.labels, there.sizes, step, there.views, there.indices)

    def add_gradients(part: DomainBatch, share: float | None = None) -> Tensor:
        loss = components.objective(components.view, part)
        loss = loss if share is None else share * loss
        shown = accelerator.reduce(loss.detach(), reduction="mean")
        assert isinstance(shown, Tensor)
        if shown.device.type == "cpu" and not torch.isfinite(shown):
            raise NonFiniteLossError(_advice(components, step, shown.item()))
        accelerator.backward(components.scaled(loss))
        return shown

    def pass_over() -> Tensor:
        # Dropout, Mixup and their kin draw from the stream of this step: a resumed run draws the same, and so does a
        # step rule that passes over the batch twice.
        torch.manual_seed(seed)
        if components.objective.accumulates != "images" or components.config.train.accumulate == 1:
            shown = add_gradients(moved)
        else:
            parts = moved.parts(components.config.train.accumulate)
            shown = torch.stack([add_gradients(part, share) for share, part in parts]).sum()
        if step < components.config.train.probe_steps:
            keep_classifier_gradients_(components.network, components.objective)
        return shown

    return _make_update(components, pass_over, step)


def _make_update(components: Components, pass_over: Callable[[], Tensor], step: int) -> Tensor:
    """Let the step rule make an update by passes over the batch; one whose scaled gradients overflow is left out."""
    scale, optimizer = components.loss_scale, components.optimizer
    if scale is None:
        return components.step_rule(Update(pass_over, optimizer, components.network))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def backward() -> Tensor:
        return scale.add_gradients(parameters, pass_over)

    try:
        loss = components.step_rule(Update(backward, optimizer, components.network))
    except GradientOverflow as overflow:
        if not math.isfinite(float(overflow.loss)):
            raise NonFiniteLossError(_advice(components, step, float(overflow.loss))) from overflow
        if float(scale.factor) < 1:
            raise NonFiniteLossError(
                f"gradients overflow float16 at step {step + 1} without any scale; the last good state is kept in the "
                "run folder. Start anew with train.precision=bf16 or fp32, or a lower learning rate"
            ) from overflow
        return overflow.loss
    scale.after_update()
    return loss


def _advice(components: Components, step: int, loss: float) -> str:
    rate = components.config.optimizer.lr
    text = f"the training loss became {loss} at step {step + 1}; the last good state is kept in the run folder."
    return f"{text} Start anew with a lower learning rate (--lr {rate / 5:g}; it was {rate:g}), or look at the data."
