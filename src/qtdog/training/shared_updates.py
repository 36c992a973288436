"""Runs that differ in the averager alone share their updates: one trains, the others follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qtdog.core.config import Config
from qtdog.core.errors import QtdogError, RunError
from qtdog.runs.folder import RunFolder
from qtdog.training.build import make_averager
from qtdog.training.checkpoint import Checkpoint, checkpoint_folders, read_checkpoint, restore_averager_
from qtdog.training.components import Components, RunState
from qtdog.training.fork import begin_fork_


@dataclass(frozen=True)
class SharedRun:
    """A run that takes the updates of another one for its own.

    An averager watches the weights and changes none, so that runs which differ in it alone make the same updates, bit
    for bit. The one that trains lets the others note, evaluate and save what they would have; they finish by
    themselves, from their last checkpoint.

    Attributes:
        config: equal to that of the run that trains but for its averager.
        folder: of the run.
    """

    config: Config
    folder: RunFolder


@dataclass(frozen=True)
class Seat:
    """One run on board: what it is made of, where it stands, and where it writes."""

    parts: Components
    state: RunState
    folder: RunFolder


def may_share_updates(one: Config, other: Config) -> bool:
    """Return whether two runs make the same updates because they differ in nothing but the averager.

    Example:
        >>> sma = Config.model_validate({"averager": {"name": "sma"}})
        >>> may_share_updates(Config(), sma), may_share_updates(Config(), Config())
        (True, False)
    """
    return one != other and one == other.model_copy(update={"averager": one.averager})


@contextlib.contextmanager
def joined(
    companions: Sequence[SharedRun],
    parts: Components,
    step: int,
    warn: Callable[[str], None],
    fork_from: Checkpoint | None = None,
) -> Iterator[list[Seat]]:
    """Hold the folders of those companions that stand where a run begins, and give what they need to come along.

    Who stands elsewhere, is finished or in the hands of another process stays out: it trains by itself later.

    Args:
        companions: who wants to come along.
        parts: of the run that trains, which has taken its place.
        step: where that is.
        warn: is told of a companion that cannot.
        fork_from: as in `training.run.run`.
    """
    with contextlib.ExitStack() as held:
        found = [_seat(companion, parts, step, warn, fork_from=fork_from, held=held) for companion in companions]
        yield [seat for seat in found if seat is not None]


def _seat(
    companion: SharedRun,
    parts: Components,
    step: int,
    warn: Callable[[str], None],
    *,
    fork_from: Checkpoint | None,
    held: contextlib.ExitStack,
) -> Seat | None:
    """Return the seat of a companion, and give the lock of its folder to `held`; None if it stays out."""
    own = replace(parts, config=companion.config, averager=make_averager(companion.config))
    with contextlib.ExitStack() as lock:
        try:
            if not may_share_updates(parts.config, companion.config):
                raise RunError("it differs in more than the averager")
            lock.enter_context(companion.folder.lock())
            state = _state_at(step, companion, own, fork_from)
        except QtdogError as error:
            warn(f"{companion.folder.path} trains by itself: {error}")
            return None
        if state is None:
            return None
        held.push(lock.pop_all())
    return Seat(own, state, companion.folder)


def _state_at(step: int, companion: SharedRun, parts: Components, fork_from: Checkpoint | None) -> RunState | None:
    """Return the state of a companion after `step` updates, its averager restored; None if it is not there."""
    folder = companion.folder
    folder.claim(companion.config, resume=True)
    if folder.read_result() is not None:
        return None
    saved = folder.checkpoints / f"step-{step:08d}"
    if saved.is_dir():
        return _restored(read_checkpoint(saved), parts)
    if checkpoint_folders(folder.checkpoints):
        return None
    if fork_from is not None and fork_from.step == step:
        return begin_fork_(parts, fork_from)  # puts in once more what the run has taken from it
    return RunState() if step == 0 else None


def _restored(checkpoint: Checkpoint, parts: Components) -> RunState | None:
    """Return the state of a checkpoint; None if it was trained to other weights (on other hardware, say)."""
    own, saved = parts.network.state_dict(), checkpoint.tensors["network"]
    # one from before quantizers kept `enabled_share` in the state lacks only that
    same_names = saved.keys() <= own.keys() and all(name.endswith("_share") for name in own.keys() - saved.keys())
    if not same_names or not all(torch.equal(value, own[name].cpu()) for name, value in saved.items()):
        return None
    return restore_averager_(parts, checkpoint)
