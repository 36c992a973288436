"""What a run keeps to go on from: writing it, and putting it back."""

from __future__ import annotations

from collections.abc import Callable

from qtdog.core.errors import RunError
from qtdog.runs.folder import RunFolder
from qtdog.training.checkpoint import Checkpoint, latest_checkpoint, write_checkpoint
from qtdog.training.fork_state import begin_fork_
from qtdog.training.optimizer_state import flatten_optimizer, plain_names, restore_optimizer_
from qtdog.training.parts import Parts
from qtdog.training.state import RunState


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
        names = plain_names(parts.network, parts.objective)
        moments, groups = checkpoint.tensors["optimizer"], checkpoint.state["optimizer_groups"]
        restore_optimizer_(parts.optimizer, names, moments, groups)
        state = restore_averager_(parts, checkpoint)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise RunError(f"the checkpoint in {folder.checkpoints} does not fit this run: {error}") from error
    if parts.quantizer is not None:
        parts.quantizer.set_enabled(checkpoint.state["quantizer_enabled"])
    return state


def restore_averager_(parts: Parts, checkpoint: Checkpoint) -> RunState:
    """Put what a checkpoint holds besides the training itself into the averager, and return where the run stood.

    Raises:
        KeyError: the checkpoint is of another averager.
    """
    parts.averager.restore(checkpoint.tensors["averager"], checkpoint.state["averager"])
    state = RunState.from_json(checkpoint.step, checkpoint.state)
    state.selected = checkpoint.tensors.get("selected")
    return state
