"""Steps that several runs share: a float fork point from which they go on, or all updates but the averager's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from qtdog.conversion.attach import sites
from qtdog.core.config import AFTER_TRAINING, Config
from qtdog.core.config_io import differences
from qtdog.core.errors import CollapseError, QtdogError, RunError
from qtdog.core.progress import RunCallback
from qtdog.models.feature_layers import FEATURE_LAYERS
from qtdog.runs.folder import RunFolder
from qtdog.runs.record import Record
from qtdog.training.averagers import Averager, make_averager, snapshot
from qtdog.training.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    plain_names,
    read_checkpoint,
    restore_averager_,
    restore_moments_,
)
from qtdog.training.components import Components, RunState
from qtdog.training.loop import TrainingRun, evaluation_is_due
from qtdog.training.step_rules import lr_factor

import_module("qtdog.training.swad")  # enters its name among the averagers

# What may differ between a run and the float run that it begins from, since nothing of it acts before the fork: where
# the data lies, the quantizer and its step sizes, the averager (it must begin later or be the same), what is kept and
# chosen. The
# schedule and the length are compared by the learning rates that they give.
FREE = {
    "averager": {"name", "params"},
    "data": {"source", "workers", "allow_missing_classes"},
    "optimizer": {"step_size_lr", "schedule", "decay_from"},
    "train": {"steps", "checkpoint_every", "selection"},
}


def fork_point_config(config: Config) -> Config:
    """Return the float run whose first steps are those of `config`: no quantizer, the same learning rates.

    It has no averager, but that of `config` if quantization begins with its average.

    Configurations that differ only in their quantizer's choices (but not in its start step) have the same one.

    Example:
        >>> from qtdog.core.config_io import build_config
        >>> four, seven = (build_config([{"quantizer": {"bits": bits}}]) for bits in (4, 7))
        >>> fork_point_config(four) == fork_point_config(seven) != four
        True
    """
    float_run = Config.model_validate({"quantizer": {"name": "none"}})
    optimizer = config.optimizer.model_copy(update={"decay_from": config.decay_from})
    averager = config.averager if _begins_with_average(config) else float_run.averager
    changes = {"quantizer": float_run.quantizer, "averager": averager, "optimizer": optimizer}
    return config.model_copy(update=changes)


def begin_fork_(components: Components, checkpoint: Checkpoint) -> RunState:
    """Put a float run's checkpoint into the components of another run and return the state to go on from.

    Taken over are weights and buffers, the optimizer's moments, the objective's state, the evaluations so far and the
    sum of the losses since the last one; the average so far too, if both runs have the same averager. What follows is
    then bit-identical to training from step 0. Time is counted from the fork on.

    Raises:
        RunError: the checkpoint is none of a float run, lies behind the start step, or comes from a configuration that
            differs in something that acts before the fork; each difference is listed.
    """
    prefix = prefix_of(checkpoint)
    check_fork(components, prefix, checkpoint.step)
    try:
        load_plain_(components.network, checkpoint.tensors["network"])
        components.objective.load_state_dict(checkpoint.tensors["objective"])
        names = plain_names(components.network, components.objective)
        restore_moments_(components.optimizer, names, checkpoint.tensors["optimizer"])
        if _same_averager(prefix, components.config):
            _restore_average_(components, checkpoint)
        else:
            _count_(components, checkpoint)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"the checkpoint at step {checkpoint.step} does not fit this run: {error}") from error
    selectable = components.selectable
    state = RunState.from_json(checkpoint.step, checkpoint.state)
    state.lines = [line | {"selectable": selectable} for line in state.lines]
    selected = checkpoint.tensors.get("selected") if selectable else None
    state.selected = None if selected is None else snapshot(components.network) | _places(components.network, selected)
    state.trained_s = 0.0
    state.saved_step = 0  # in this run's folder nothing is saved yet
    state.forked_from = {"step": checkpoint.step, "seed": checkpoint.state.get("first_seed", prefix.train.seed)}
    return state


def _same_averager(prefix: Config, config: Config) -> bool:
    """Return whether a float run keeps just the average that another one goes on with."""
    return prefix.averager == config.averager and (config.start_step is None or _begins_with_average(config))


def _begins_with_average(config: Config) -> bool:
    return config.quantizer.start_from == "average" and config.start_step is not None


def _count_(components: Components, checkpoint: Checkpoint) -> None:
    """Let an averager that begins with the very update behind which the checkpoint was taken count its weights."""
    counts = components.selectable or components.averager.COUNTS_FLOAT
    if components.averager.begin == checkpoint.step and counts:
        components.averager.after_step(checkpoint.step, components.network)
        saved = RunState.from_json(checkpoint.step, checkpoint.state)
        if saved.evaluated_step == checkpoint.step:
            components.averager.after_evaluation(checkpoint.step, saved.records[-1].seen.source_loss)


def prefix_of(checkpoint: Checkpoint) -> Config:
    """Return the configuration of the run that wrote a checkpoint.

    Raises:
        RunError: it was written by a version that did not keep it.
    """
    if "config" not in checkpoint.state:
        raise RunError(f"the checkpoint at step {checkpoint.step} does not say what made it; train its run anew")
    return Config.model_validate(checkpoint.state["config"])


def reseeded(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """Return the checkpoint as the beginning of a run with another seed: members that share a beginning.

    Such a run is none that could be trained from step 0: its first steps are those of the first seed, which its result
    gives as `forked_from_seed`.

    Example:
        >>> first = Checkpoint(2, {}, {"config": Config().model_dump(mode="json")})
        >>> prefix_of(reseeded(first, 5)).train.seed, reseeded(first, 5).state["first_seed"]
        (5, 0)
    """
    config = prefix_of(checkpoint)
    first = checkpoint.state.get("first_seed", config.train.seed)
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
    return replace(checkpoint, state=checkpoint.state | {"config": other.model_dump(mode="json"), "first_seed": first})


def check_fork(components: Components, prefix: Config, step: int) -> None:
    """Check that the run of `components` may begin from step `step` of the run of `prefix`.

    Raises:
        RunError: as in `begin_fork_`.
    """
    obstacle = fork_obstacle(prefix, components.config, components.averager, step)
    if obstacle:
        raise RunError(obstacle)


def fork_obstacle(prefix: Config, config: Config, averager: Averager, step: int) -> str | None:
    """Return in words why the run of `config` cannot begin from step `step` of the run of `prefix`; None if it can.

    Args:
        prefix: of a float run.
        config: of the run that is to begin from it.
        averager: the run's.
        step: updates made.
    """
    if prefix.start_step is not None or (prefix.quantizer.name in AFTER_TRAINING and config.start_step is not None):
        prefix_name = prefix.quantizer.name
        return f"a run begins from a float run (quantizer none), not from one with '{prefix_name}'"
    if prefix.averager.name != "none" and not _same_averager(prefix, config):
        return f"a run begins from one without an averager or with its own, not from one with '{prefix.averager.name}'"
    last = config.train.steps - 1 if config.start_step is None else config.start_step
    if not 0 < step <= last:
        return f"this run can begin from a checkpoint at step 1 to {last}, not from step {step}"
    # batch norm that adapts is measured anew for an average, even one of a single update
    adapts = not config.model.freeze_bn or FEATURE_LAYERS[config.model.feature_layer].LEARNS_STATISTICS
    first = averager.begin - 1 if adapts else averager.begin
    if config.averager.name != "none" and first < step and not _same_averager(prefix, config):
        text = f"the averager '{config.averager.name}' counts weights from update {averager.begin} on"
        return f"{text}, and those before step {step} are not in the checkpoint: train from step 0"
    changes = fork_differences(prefix, config, step)
    if changes:
        listed = "\n  ".join(changes)
        return f"the checkpoint at step {step} is of another run, they differ before that step:\n  {listed}"
    return None


def fork_differences(prefix: Config, config: Config, step: int) -> list[str]:
    """Return one line for each value that differs between two runs and acts before update number `step` + 1.

    Example:
        >>> from qtdog.core.config_io import build_config
        >>> one, other = build_config([{"train": {"seed": 1}}]), build_config([{"quantizer": {"bits": 3}}])
        >>> fork_differences(one, other, 100)
        ['train.seed: 1 → 0']
    """
    trees = [_acting(one) for one in (prefix, config)]
    changes = differences(*(Config.model_validate(tree) for tree in trees))
    if [_factor(prefix, n) for n in range(step)] != [_factor(config, n) for n in range(step)]:
        changes.append(f"the learning rates of the first {step} steps (optimizer.schedule, decay_from, train.steps)")
    if config.start_step is None and prefix.train.selection != config.train.selection:
        changes.append(f"train.selection: {prefix.train.selection} → {config.train.selection}")
    return changes


def _acting(config: Config) -> dict[str, Any]:
    """Return the tree of a configuration without what may differ."""
    tree = config.model_dump(mode="json", exclude={"quantizer"})
    return {
        section: {key: value for key, value in values.items() if key not in FREE.get(section, ())}
        for section, values in tree.items()
    }


def _factor(config: Config, step: int) -> float:
    return lr_factor(config.optimizer.schedule, step, decay_from=config.decay_from, steps=config.train.steps)


def load_plain_(network: nn.Module, plain: dict[str, Tensor]) -> None:
    """Give a network, with quantizers that are not enabled, the weights of its plain form; what is theirs stays.

    Raises:
        KeyError: `plain` has other names than the network.

    Example:
        >>> import torch
        >>> from qtdog.conversion.attach import attach
        >>> network, source = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> _ = attach(network)
        >>> load_plain_(network, source.state_dict())
        >>> torch.equal(network.weight, source.weight)
        True
    """
    network.load_state_dict(_places(network, plain), strict=False)


def _places(network: nn.Module, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network's plain form under the names that they have in it (KeyError as above)."""
    names = _plain_names(network)
    different = sorted(set(names.values()) ^ plain.keys())
    if different:
        raise KeyError(f"they have not the same weights; only one has {', '.join(different[:5])}")
    return {key: plain[name] for key, name in names.items()}


def _plain_names(network: nn.Module) -> dict[str, str]:
    """Return what entries of a network's state are called in its plain form, those of its quantizers left out."""
    places = {f"{site.prefix}original": site.plain_name for site in sites(network)}
    theirs = tuple(site.prefix for site in sites(network))
    return {key: places.get(key, key) for key in network.state_dict() if key in places or not key.startswith(theirs)}


def _restore_average_(components: Components, checkpoint: Checkpoint) -> None:
    """Let the averager go on with the average of a plain network (KeyError or ValueError if it is of another kind)."""
    own = {plain: name for name, plain in _plain_names(components.network).items()}
    tensors = {}
    for key, tensor in checkpoint.tensors["averager"].items():
        which, bar, name = key.rpartition("|")  # an averager may keep several averages
        tensors[f"{which}{bar}{own[name]}"] = tensor
    components.averager.restore(tensors, checkpoint.state["averager"])


def latent_weights(checkpoint: Checkpoint, config: Config) -> dict[str, Tensor]:
    """Return the weights before quantization behind a run's model file, by the names of the plain network.

    Those of the selected step, or the run's average; what is not averaged is that of the last update.

    Args:
        checkpoint: the last one of the run.
        config: of the run.

    Raises:
        RunError: the checkpoint holds no selected weights.
    """
    averager = make_averager(config)
    averager.restore(checkpoint.tensors["averager"], checkpoint.state["averager"])
    averaged = averager.final()
    if averaged is None and "selected" not in checkpoint.tensors:
        raise RunError(f"the checkpoint at step {checkpoint.step} has no selected weights: the run is not finished")
    state = checkpoint.tensors["selected"] if averaged is None else checkpoint.tensors["network"] | averaged
    return {plain: value for name, value in state.items() if (plain := latent_name(name)) is not None}


def latent_name(name: str) -> str | None:
    """Return the name in the plain network of an entry of a network with quantizers; None for a quantizer's own state.

    Example:
        >>> latent_name("featurizer.conv.parametrizations.weight.original")
        'featurizer.conv.weight'
        >>> latent_name("conv.parametrizations.weight.0.log_scale"), latent_name("conv.bias")
        (None, 'conv.bias')
    """
    head, found, tail = name.rpartition("parametrizations.")
    if not found:
        return name
    return head + tail.removesuffix(".original") if tail.endswith(".original") else None


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
