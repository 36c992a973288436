"""Batches: training batches as a pure function of the step, evaluation batches in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.errors import ConfigError, DataError
from qtdog.core.random import torch_stream
from qtdog.data.augment import augment
from qtdog.data.augment_parameters import draw_parameters
from qtdog.data.buffers import BufferPool
from qtdog.data.cache import DecodedCache
from qtdog.data.normalise import normalise
from qtdog.data.sampler import batch_sizes, cumulated, draw

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One training step's images: the source domains one after another.

    Attributes:
        images: float32 (n, C, H, W), normalised, channels-last.
        labels: int64 (n,).
        domains: the domain names, in the order of the images.
        sizes: images per domain; they add up to n.
    """

    images: Tensor
    labels: Tensor
    domains: tuple[str, ...]
    sizes: tuple[int, ...]


class TrainBatches:
    """Domain-balanced, augmented training batches, each a pure function of its step.

    Args:
        cache: the decoded images.
        class_index: class per image of the cache (n,).
        pools: training indices per source domain, in the order that batches have.
        batch_size: images per domain and step, over all processes.
        seed: of the draws and the augmentation.
        augment: "domainbed", or "none" (only normalised).
        mean: per channel, of images in [0, 1].
        std: likewise.
        workers: threads that prepare the next batches in `stream`; 0 prepares each when it is asked for.
        rank: which of `world` processes this is: it gets images rank, rank + world, … of each domain.
        world: number of processes.
        focus: the domain that gets half of each batch; "" for equal shares.
        class_weights: how often each class is drawn within its domain (`data.sampler.cumulated`); "none": as it is.

    Raises:
        ConfigError: the batch size cannot be shared evenly by the processes, or `focus` is none of the domains.
        DataError: there is no domain, or one without training images.
    """

    def __init__(
        self,
        cache: DecodedCache,
        class_index: npt.NDArray[np.integer],
        pools: Mapping[str, Indices],
        *,
        batch_size: int,
        seed: int,
        augment: Literal["domainbed", "none"],
        mean: Sequence[float],
        std: Sequence[float],
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
        focus: str = "",
        class_weights: Literal["none", "sqrt", "balanced"] = "none",
    ) -> None:
        self.sizes = batch_sizes(tuple(pools), batch_size, focus)
        if any(size % world for size in self.sizes):
            shares = f" (data.focus makes it {self.sizes})" if focus else ""
            raise ConfigError(f"data.batch_size {batch_size}{shares} cannot be shared evenly by {world} processes")
        empty = [domain for domain, pool in pools.items() if len(pool) == 0]
        if empty or not pools:
            raise DataError(f"no training images in {', '.join(empty)}" if empty else "there is no source domain")
        self.cache = cache
        self.class_index = class_index.astype(np.int64)
        self.pools = dict(pools)
        self.seed = seed
        self.augment = augment
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.workers = workers
        self.rank = rank
        self.world = world
        self._cumulated = {
            domain: None if class_weights == "none" else cumulated(self.class_index[pool], class_weights)
            for domain, pool in self.pools.items()
        }
        self._buffers = BufferPool()

    def batch(self, step: int) -> Batch:
        """Return the batch of one step (this process's share of it)."""
        sized = zip(self.pools.items(), self.sizes, strict=True)
        weights = self._cumulated
        drawn = [draw(self.seed, step, domain, pool, size, weights=weights[domain]) for (domain, pool), size in sized]
        ends = np.cumsum(self.sizes)
        parts = zip(ends - self.sizes, ends, strict=True)
        rows = np.concatenate([np.arange(first + self.rank, end, self.world) for first, end in parts])
        indices = np.concatenate(drawn)[rows]
        images = self._prepare(self.cache.gather(indices, self._buffers), step, torch.from_numpy(rows))
        sizes = tuple(size // self.world for size in self.sizes)
        return Batch(images, torch.from_numpy(self.class_index[indices]), tuple(self.pools), sizes)

    def _prepare(self, images: Tensor, step: int, rows: Tensor) -> Tensor:
        if self.augment == "none":
            return normalise(images, self.mean, self.std)
        n_global = sum(self.sizes)  # drawn for all processes, so that they see one global batch
        parameters = draw_parameters(torch_stream(self.seed, "augment", step), n_global, images.shape[1])
        return augment(images, parameters.take(rows), mean=self.mean, std=self.std, pool=self._buffers)

    def stream(self, start_step: int, end_step: int) -> Generator[Batch, None, None]:
        """Yield the batches of steps start_step … end_step - 1, the next ones being prepared in the background.

        Close the iterator (or let it be collected) to stop the threads. An error in a thread is raised here.
        """
        if self.workers == 0:
            yield from map(self.batch, range(start_step, end_step))
            return
        pool = single_threaded_pool(self.workers)
        try:
            waiting: deque[Future[Batch]] = deque()
            for step in range(start_step, end_step):
                waiting.append(pool.submit(self.batch, step))
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def single_threaded_pool(workers: int) -> ThreadPoolExecutor:
    """Return a pool of threads in each of which torch uses that one thread only.

    Otherwise each of them would split its operations over as many threads as there are cores, and they would fight with
    each other and with the training.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    barrier = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(1)
        barrier.wait()

    for _ in range(workers):
        pool.submit(start)  # each waits for the others, so that each is a thread of its own
    barrier.wait()
    torch.set_num_threads(torch.get_num_threads())  # threads started later would inherit the last value set anywhere
    return pool


def eval_batches(
    cache: DecodedCache,
    indices: Indices,
    class_index: npt.NDArray[np.integer],
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) of `indices` in their order, normalised, not augmented.

    Images are float32 (b, C, H, W) in channels-last memory, labels int64 (b,); the last batch may be smaller.
    """
    labels = class_index.astype(np.int64)
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        yield normalise(cache.gather(part), mean, std), torch.from_numpy(labels[part])
