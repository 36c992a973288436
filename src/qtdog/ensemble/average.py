"""The mean of trained weights: where they come from, how they are averaged, which members take part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from qtdog.conversion.save import bake
from qtdog.core.errors import ConfigError, RunError
from qtdog.ensemble.member import Member
from qtdog.runs.folder import RunFolder
from qtdog.training.averagers import AVERAGERS
from qtdog.training.build import make_quantizer
from qtdog.training.checkpoint import Checkpoint, latest_checkpoint
from qtdog.training.load import empty_network

State = dict[str, Tensor]


@dataclass(frozen=True)
class Latent:
    """A member's weights before quantization.

    Attributes:
        state: under the names of the plain network.
        buffers: names of what does not train, such as the statistics of batch norm.
    """

    state: State
    buffers: frozenset[str]


def read_latent(member: Member, warn: Callable[[str], None]) -> Latent:
    """Return the latent weights behind a member's model file, from the checkpoints of its run.

    Those are the weights at the selected step, or the ones that the run's averager insisted on.

    Raises:
        RunError: the run's checkpoints are gone, or do not fit its configuration.
    """
    checkpoint = latest_checkpoint(RunFolder(member.path).checkpoints, warn)
    if checkpoint is None:
        raise RunError(f"{member.path} has no checkpoint left, and only that holds the weights before quantization")
    network = empty_network(member.info)
    make_quantizer(member.config.quantizer, network)
    try:
        network.load_state_dict(_shipped(member, checkpoint))
    except (RuntimeError, KeyError) as error:
        raise RunError(f"the checkpoint in {member.path} does not fit its configuration: {error}") from error
    buffers = frozenset(name for name, _ in network.named_buffers() if ".parametrizations." not in name)
    return Latent(bake(network).rest, buffers)


def _shipped(member: Member, checkpoint: Checkpoint) -> State:
    config = member.config
    averager = AVERAGERS[config.averager.name](config.averager.params, config.start_step or 0)
    averager.restore(checkpoint.tensors["averager"], checkpoint.state["averager"])
    averaged = averager.final()
    if averaged is None:
        return checkpoint.tensors["selected"]
    return checkpoint.tensors["network"] | averaged  # what is not averaged is that of the last update


def average(states: Sequence[Mapping[str, Tensor]], buffers: AbstractSet[str] = frozenset()) -> State:
    """Return the mean of the weights, name by name: θ = (1/m) Σ_k θ_k, summed in float64.

    Source: Ramé et al. (NeurIPS 2022), Eq. 1; Wortsman et al., "Model soups" (ICML 2022).

    Args:
        states: of m plain networks, with the same names and shapes.
        buffers: names that do not train; they must be the same in all.

    Raises:
        ConfigError: a buffer differs: statistics of batch norm belong to the weights that they were measured with, and
            their mean to none.

    Example:
        >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
        {'w': tensor([2.])}
    """
    first = states[0]
    for name in sorted(buffers & first.keys()):
        if any(not torch.equal(state[name], first[name]) for state in states):
            hint = "average members with frozen batch norm (model.freeze_bn=true)"
            raise ConfigError(f"'{name}' differs between the members, and its mean would fit none of them: {hint}")
    return {
        name: value if name in buffers else _mean([state[name] for state in states]) for name, value in first.items()
    }


def _mean(values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(values[0], dtype=torch.float64)  # keeps the memory format
    for value in values:
        total += value
    return (total / len(values)).to(values[0].dtype)


def greedy(accuracies: Sequence[float], score: Callable[[Sequence[int]], float]) -> list[int]:
    """Return the members that take part in a greedy average, in the order in which they came in.

    From the best single member on, each further one, by falling accuracy, stays in if the average is then at least as
    accurate as before ("restricted" weight selection: Ramé et al., NeurIPS 2022, section 2.3.2).

    Args:
        accuracies: of each member alone, on the held-out source images.
        score: that of the average of the members at some positions, on the same images.

    Example:
        >>> greedy([0.5, 0.9, 0.8], lambda chosen: 0.7 if 2 in chosen else 0.9)
        [1, 0]
    """
    order = sorted(range(len(accuracies)), key=lambda index: -accuracies[index])
    chosen = order[:1]
    best = score(chosen)
    for index in order[1:]:
        accuracy = score([*chosen, index])
        if accuracy >= best:
            chosen, best = [*chosen, index], accuracy
    return chosen
