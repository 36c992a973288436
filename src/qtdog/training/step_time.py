"""How long one training step takes here: measured before long work, for its estimate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.nn import functional

from qtdog.core.config import Config
from qtdog.data.dataset import DomainDataset
from qtdog.models.backbones import create_network
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


def network_step_s(
    config: Config,
    dataset: DomainDataset,
    *,
    n_images: int,
    size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds of one float update of a configuration's network, from random weights on images of noise.

    No image is read, so that this takes seconds where decoding a data set takes minutes: for choosing a size.

    Args:
        config: of a run.
        dataset: its data.
        n_images: of the batch.
        size: height and width of the images, instead of the configuration's.
        clock: returns a time in seconds.

    Raises:
        ModelError: the backbone is unknown, or cannot take such images.
    """
    accelerator = Accelerator()
    channels, n_classes = dataset.card.channels, len(dataset.classes)
    network = create_network(
        config.model.backbone,
        n_classes=n_classes,
        channels=channels,
        image_size=size,
        weights="none",
        freeze_bn=config.model.freeze_bn,
        seed=0,
    ).to(accelerator.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n_images, channels, size, size, generator=generator).to(accelerator.device)
    labels = torch.zeros(n_images, dtype=torch.int64, device=accelerator.device)
    times = []
    for _ in range(PROBE_STEPS):
        started = clock()
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()  # on a GPU, wait until it is done
        times.append(clock() - started)
    return statistics.median(times[1:])  # one makes buffers
