"""Runs that differ in the averager alone share their updates: one trains, the others follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import broadcast_object_list

from qtdog.core.config import Config
from qtdog.core.errors import CollapseError, QtdogError, RunError
from qtdog.core.progress import RunCallback
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record
from qtdog.training.averagers import make_averager
from qtdog.training.checkpoint import Checkpoint, checkpoint_folders, read_checkpoint, restore_averager_
from qtdog.training.components import Components, RunState
from qtdog.training.fork import begin_fork_
from qtdog.training.loop import TrainingRun, evaluation_is_due


@dataclass(frozen=True)
class SharedRun:
    """A run that takes the updates of another one for its own.

    An averager watches the weights and changes none, so that runs which differ in it alone make the same updates, bit
    for bit. The one that trains lets the others evaluate and save what they would have; they finish by themselves,
    from their last checkpoint.

    Attributes:
        config: equal to that of the run that trains but for its averager.
        folder: of the run.
    """

    config: Config
    folder: RunFolder


def may_share_updates(one: Config, other: Config) -> bool:
    """Return whether two runs make the same updates because they differ in nothing but the averager.

    Example:
        >>> sma = Config.model_validate({"averager": {"name": "sma"}})
        >>> may_share_updates(Config(), sma), may_share_updates(Config(), Config())
        (True, False)
    """
    if one.quantizer.start_from == "average":  # what is trained depends on the average
        return False
    return one != other and one == other.model_copy(update={"averager": one.averager})


class SharedUpdates(RunCallback):
    """The callback of a run through which others follow its updates.

    They never stop it: one that collapses is dropped, and goes on from its last checkpoint when it trains by itself.
    They are saved before the run that trains: killed between two saves, all still have a checkpoint of the step where
    that one goes on.
    """

    def __init__(
        self, leader: TrainingRun, followers: Sequence[TrainingRun], check_interrupt: Callable[[], None]
    ) -> None:
        self._leader, self._followers, self._check_interrupt = leader, list(followers), check_interrupt
        self._trained_s = leader.state.trained_s

    def on_start(self, config: Config, step: int) -> None:
        """Evaluate those that stopped before the evaluation of the present step, which the leader has made."""
        if not evaluation_is_due(self._leader.components.config, self._leader.state):
            self._evaluate(None)

    def on_step(self, step: int, loss: float, n_images: int) -> None:
        """Count the update in each."""
        seconds, self._trained_s = self._leader.state.trained_s - self._trained_s, self._leader.state.trained_s
        newest = self._leader.newest_loss
        assert newest is not None
        for follower in self._followers:
            follower.after_step(newest, seconds)

    def on_record(self, record: object) -> None:
        """Evaluate each; the weights as they are only once for all."""
        self._evaluate(self._leader.plain_record)

    def on_save(self, step: int) -> None:
        """Save each."""
        for follower in self._followers:
            follower.save()

    def _evaluate(self, known: Record | None) -> None:
        for follower in list(self._followers):
            if not evaluation_is_due(follower.components.config, follower.state):
                continue
            try:
                follower.evaluate(self._check_interrupt, known)
            except CollapseError:
                self._followers.remove(follower)
            known = known or follower.plain_record


@contextlib.contextmanager
def open_shared_runs(
    shared_runs: Sequence[SharedRun],
    components: Components,
    step: int,
    warn: Callable[[str], None],
    fork_from: Checkpoint | None = None,
) -> Iterator[list[TrainingRun]]:
    """Lock the folders of those runs that stand at the step where another one begins, and yield them.

    Runs at another step, finished or locked by another process are skipped: they train by themselves later. Of several
    processes the first one decides and holds the locks.

    Args:
        shared_runs: that could follow.
        components: of the run that trains, its weights those of `step`.
        step: where it begins.
        warn: is called with a run that cannot follow.
        fork_from: as in `training.run.run`.
    """
    with contextlib.ExitStack() as locks:
        opened = []
        for shared in shared_runs:
            own = replace(components, config=shared.config, averager=make_averager(shared.config))
            state = None
            if components.accelerator.is_main_process:
                state = _open(shared, components, own, step, warn, fork_from=fork_from, locks=locks)
            if components.accelerator.num_processes > 1:
                taken = [state is not None]
                broadcast_object_list(taken)
                if taken[0] and state is None:
                    state = _state_at(step, shared.folder, own, fork_from)
            if state is not None:
                opened.append(TrainingRun(own, state, shared.folder))
        yield opened


def _open(
    shared: SharedRun,
    leader: Components,
    own: Components,
    step: int,
    warn: Callable[[str], None],
    *,
    fork_from: Checkpoint | None,
    locks: contextlib.ExitStack,
) -> RunState | None:
    """Return the state of a run that can follow, and give the lock of its folder to `locks`; None if it is skipped."""
    with contextlib.ExitStack() as lock:
        try:
            if not may_share_updates(leader.config, shared.config):
                raise RunError("it differs in more than the averager")
            lock.enter_context(shared.folder.lock())
            shared.folder.claim(shared.config, resume=True)
            state = None if shared.folder.read_result() is not None else _state_at(step, shared.folder, own, fork_from)
        except QtdogError as error:
            warn(f"{shared.folder.path} trains by itself: {error}")
            return None
        if state is not None:
            locks.push(lock.pop_all())
    return state


def _state_at(step: int, folder: RunFolder, own: Components, fork_from: Checkpoint | None) -> RunState | None:
    """Return the state of a run after `step` updates, its averager restored; None if it is not there."""
    saved = folder.checkpoints / f"step-{step:08d}"
    if saved.is_dir():
        checkpoint = read_checkpoint(saved)
        # of other hardware, say, or from before the run that trains was started anew
        same_weights = not own.accelerator.is_main_process or _has_weights(own, checkpoint)
        return restore_averager_(own, checkpoint) if same_weights else None
    if checkpoint_folders(folder.checkpoints):
        return None
    if fork_from is not None and fork_from.step == step:
        return begin_fork_(own, fork_from)  # loads once more what the run that trains has loaded from it
    return RunState() if step == 0 else None


def _has_weights(components: Components, checkpoint: Checkpoint) -> bool:
    own, saved = components.network.state_dict(), checkpoint.tensors["network"]
    # one from before quantizers kept `enabled_share` in the state lacks only that
    same_names = saved.keys() <= own.keys() and all(name.endswith("_share") for name in own.keys() - saved.keys())
    return same_names and all(torch.equal(value, own[name].cpu()) for name, value in saved.items())
