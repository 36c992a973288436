"""How long one training step takes here: measured before long work, for its estimate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from qtdog.core.config import Config
from qtdog.data.dataset import DomainDataset
from qtdog.training.build import build_components
from qtdog.training.components import Components
from qtdog.training.loop import begin_step, update

OVERHEAD = 1.2  # of a run's time over that of its steps (start, evaluations, checkpoints), until something was measured
PROBE_STEPS = 5


def probe(
    config: Config, dataset: DomainDataset, *, threads: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of one training step of a configuration on this machine: the median of five.

    Args:
        config: of a run.
        dataset: its data.
        threads: of each run of the sweep. Two threads on two cores of which another process has one wait for each
            other at every operation, and would tell nothing of a run with one.
        clock: returns a time in seconds.

    Raises:
        ConfigError, DataError, ModelError: as in `training.build.build_components`.
    """
    short = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = build_components(short, dataset)
        parts.network.train()
        return statistics.median(
            [_step_s(parts, step, clock) for step in range(PROBE_STEPS + 1)][1:]
        )  # one makes buffers
    finally:
        torch.set_num_threads(before)


def _step_s(parts: Components, step: int, clock: Callable[[], float]) -> float:
    started = clock()
    begin_step(parts, step)
    update(parts, parts.batches.batch(step), step).item()  # on a GPU, wait until it is done
    return clock() - started
