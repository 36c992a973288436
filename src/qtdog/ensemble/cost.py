"""What an ensemble costs: updates to train it, forward passes to ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtdog.ensemble.member import Member


@dataclass(frozen=True)
class Cost:
    """The cost of a model beside one run and one network.

    Attributes:
        training_steps: updates behind it; what members share at their beginning counts once.
        training_runs: the same in lengths of one run.
        inference_passes: forward passes per image.
    """

    training_steps: int
    training_runs: float
    inference_passes: int


def cost(members: Sequence[Member], *, one_model: bool, extra_steps: int = 0) -> Cost:
    """Return the cost of a model made from `members`.

    Five runs that share the first 40 % of their steps cost 0.4 + 5 · 0.6 = 3.4 runs.

    Args:
        members: the runs it is made from.
        one_model: whether it is one network; else every member is asked.
        extra_steps: updates made after the members were joined.
    """
    own = sum(member.config.train.steps - member.forked_from[1] for member in members)
    shared = sum(step for _, step in {member.forked_from for member in members})
    one_run = sum(member.config.train.steps for member in members) / len(members)
    steps = own + shared + extra_steps
    return Cost(steps, steps / one_run, 1 if one_model else len(members))
