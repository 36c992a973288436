"""Which weights should be averaged: those that the rounded models ship, or those that lay behind the rounding?

    python benchmarks/soup_weights.py RUNS --data DATA

RUNS is a folder of finished runs with rounded weights. Those that differ in nothing but their seed are one group, and
must have one random start. Prints for each group the accuracy, on the unseen domain and on the held-out images of the
sources, of its members, of the mean of the weights that they ship, and of the mean of those behind the rounding; then
the differences of the two means over the groups. No mean is rounded again, so that the two differ in the weights alone.
The second one needs the checkpoints of the runs.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from qtdog.core.config import config_hash
from qtdog.data.open import open_dataset
from qtdog.ensemble.model import Member, check_one_start, read_member
from qtdog.ensemble.scoring import EvaluationSet, mean_accuracy, open_evaluation_set
from qtdog.ensemble.weight_averaging import average_weights, shipped_weights
from qtdog.runs.find import run_folders
from qtdog.runs.folder import RunFolder
from qtdog.runs.statistics import t_interval
from qtdog.training.checkpoint import latest_checkpoint
from qtdog.training.load_model import empty_network
from qtdog.training.shared_steps import latent_weights

ROWS = ("unseen", "sources")


def groups_of(folders: Sequence[Path]) -> list[list[Member]]:
    """Return the finished runs with rounded weights that differ in their seed alone, where there are several.

    Raises:
        ConfigError: runs of a group have no common start.
    """
    groups: dict[str, list[Member]] = defaultdict(list)
    for folder in folders:
        run = RunFolder(folder)
        if run.read_result() is None or run.read_config() is None:  # not finished, or an ensemble
            continue
        if (member := read_member(folder)).packed.quantized:
            train = member.config.train.model_copy(update={"seed": 0})
            groups[config_hash(member.config.model_copy(update={"train": train}))].append(member)
    for members in groups.values():
        check_one_start(members)
    return sorted((members for members in groups.values() if len(members) > 1), key=lambda members: name_of(members[0]))


def name_of(member: Member) -> str:
    """Return the target, quantizer and averager of a run."""
    config = member.config
    return f"{config.data.target}, {config.quantizer.name} {config.quantizer.bits} bits, {config.averager.name}"


def behind_rounding(member: Member) -> dict[str, Tensor]:
    """Return the float weights that a member's rounded ones come from."""
    checkpoint = latest_checkpoint(RunFolder(member.path).checkpoints, print)
    assert checkpoint is not None, f"{member.path} has no checkpoint left"
    return latent_weights(checkpoint, member.config)


def score(states: Sequence[Mapping[str, Tensor]], member: Member, images: EvaluationSet) -> list[float]:
    """Return the accuracy of the mean of weights on the unseen domain and on the sources."""
    network = empty_network(member.info)
    buffers = frozenset(name for name, _ in network.named_buffers())
    network.load_state_dict(average_weights(states, buffers))
    network.eval()
    found = [images.test(lambda batch: network(batch)[None])[0], images.source(lambda batch: network(batch)[None])]
    unseen, sources = (mean_accuracy(scores, 0) for scores in found)
    assert unseen is not None, "the runs have no unseen domain"
    assert sources is not None, "no source images were held out"
    return [unseen, sources]


def main() -> None:
    """Score every group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data", default="rotated-digits")
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    differences: list[list[float]] = []
    print("| runs | n | members | mean of the files | mean from behind the rounding |\n| --- | --- | --- | --- | --- |")
    for members in groups_of(run_folders(options.runs)):
        images = open_evaluation_set(members[0].config, dataset, same_splits=True)
        keys = ("test_accuracy", "source_accuracy")
        alone = [float(np.mean([member.result[key] for member in members])) for key in keys]
        shipped = score([shipped_weights(member) for member in members], members[0], images)
        behind = score([behind_rounding(member) for member in members], members[0], images)
        cells = [" / ".join(f"{100 * value:.1f}" for value in values) for values in (alone, shipped, behind)]
        print(f"| {name_of(members[0])} | {len(members)} | {' | '.join(cells)} |", flush=True)
        differences.append([100 * (one - other) for one, other in zip(shipped, behind, strict=True)])
    if not differences:
        raise SystemExit(f"{options.runs} has no finished runs that differ in their seed alone; links are not followed")
    print("\naccuracy in %, unseen / sources; the first mean − the second, in points:")
    for row, values in zip(ROWS, zip(*differences, strict=True), strict=True):
        low, high = t_interval(values)
        print(f"  {row} {np.mean(values):+.1f} ({low:+.1f} … {high:+.1f}), {len(values)} groups")


if __name__ == "__main__":
    main()
