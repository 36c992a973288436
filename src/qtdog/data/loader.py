"""Batches: the sampler, training batches as a pure function of the step, evaluation batches in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.errors import ConfigError, DataError, unknown
from qtdog.core.random import numpy_stream, torch_stream
from qtdog.core.registry import Value, fill
from qtdog.data.augment import AUGMENTATIONS, CPU, BufferPool, augment, draw_parameters, normalize, upload
from qtdog.data.augment_on_device import augment_on_device
from qtdog.data.augment_policies import POLICIES, PolicyAugmentation, crop_and_flip
from qtdog.data.decoded_cache import InputCache
from qtdog.data.original_cache import OriginalCache

BUILT_IN = ("domainbed", "none", *POLICIES)  # augmentations of the package


def draw(
    seed: int,
    step: int,
    domain: str,
    pool: npt.NDArray[np.int64],
    n: int,
    *,
    weights: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """Return n members of `pool`, drawn with replacement: a pure function of (seed, step, domain).

    Nothing is remembered between steps, so that a resumed run draws what an undisturbed one would have drawn.

    Args:
        seed: of the run.
        step: which draw it is.
        domain: of which domain.
        pool: dataset indices.
        n: how many.
        weights: cumulated probabilities of the members (`cumulated`); default: all alike.

    Example:
        >>> draw(0, 7, "photo", np.array([3, 5]), 4).shape
        (4,)
    """
    stream = numpy_stream(seed, "sample", domain, step)
    if weights is None:
        return pool[stream.integers(len(pool), size=n)]
    return pool[np.searchsorted(weights, stream.random(n), side="right").clip(max=len(pool) - 1)]


def cumulated(labels: npt.NDArray[np.integer], weighting: Literal["sqrt", "balanced"]) -> npt.NDArray[np.float64]:
    """Return cumulated probabilities with which images of a domain are drawn, so that rare classes come more often.

    Formula: p(image) ∝ n_c^(−a) with n_c images of its class in the domain; a = 1 ("balanced": every class is drawn
    equally often) or 1/2 ("sqrt": class c is drawn in proportion to √n_c). In expectation this weighs the loss of each
    image alike, with any objective.

    Args:
        labels: class of each image of the pool (n,).
        weighting: "sqrt" or "balanced".

    Example:
        >>> cumulated(np.array([0, 0, 0, 1]), "balanced").round(3).tolist()
        [0.167, 0.333, 0.5, 1.0]
    """
    counts = np.bincount(labels)[labels]
    weights = counts ** (-1.0 if weighting == "balanced" else -0.5)
    return np.cumsum(weights / weights.sum())


def batch_sizes(domains: Sequence[str], batch_size: int, focus: str = "") -> tuple[int, ...]:
    """Return the images per domain of one step: equal shares, or half for `focus` and equal shares of the rest.

    Raises:
        ConfigError: `focus` is none of the domains, or there is no other, or nothing is left for the others.

    Example:
        >>> batch_sizes(("art", "cartoon", "photo"), 32, focus="photo")
        (24, 24, 48)
    """
    if not focus:
        return (batch_size,) * len(domains)
    if focus not in domains:
        raise ConfigError(unknown("source domain for data.focus", focus, list(domains)))
    other = len(domains) * batch_size // (2 * max(len(domains) - 1, 1))
    if len(domains) == 1 or other == 0:
        raise ConfigError("data.focus shares each batch with other domains: it takes two or more, and a larger batch")
    return tuple(len(domains) * batch_size - other * (len(domains) - 1) if d == focus else other for d in domains)


Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One training step's images: the source domains one after another.

    Attributes:
        images: float32 (n, C, H, W), normalized, channels-last.
        labels: int64 (n,).
        domains: the domain names, in the order of the images.
        sizes: images per domain; they add up to n.
        views: augmented versions of the images, each of their shape; () if none were asked for.
        indices: int64 (n,), which images of the data set these are.
    """

    images: Tensor
    labels: Tensor
    domains: tuple[str, ...]
    sizes: tuple[int, ...]
    views: tuple[Tensor, ...] = ()
    indices: Tensor | None = None

    def on(self, device: torch.device) -> Batch:
        """Return the batch on a device; itself if it is there. `indices` stay on the CPU, where caches are."""
        views = tuple(upload(view, device) for view in self.views)
        return replace(self, images=upload(self.images, device), labels=upload(self.labels, device), views=views)


Ahead = Callable[[Callable[[], Batch]], Callable[[], Batch]]
"""Runs what makes a batch on a device, and returns what gives the batch to the computation once it is made."""


class CudaAhead:
    """Has batches made on a GPU on a stream of its own: neither the host nor the running computation waits.

    It is called by the threads that prepare batches, so that the next ones lie on the GPU before they are asked for.

    Args:
        device: of type cuda.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def __call__(self, make: Callable[[], Batch]) -> Callable[[], Batch]:
        """Begin to make a batch."""
        with torch.cuda.stream(self.stream):
            made = make()
            done = self.stream.record_event()

        def ready() -> Batch:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(done)
            for tensor in (made.images, made.labels, *made.views):
                tensor.record_stream(computing)  # its memory is not given away while the computation uses it
            return made

        return ready


class TrainBatches:
    """Domain-balanced, augmented training batches, each a pure function of its step.

    Args:
        cache: the decoded images.
        class_index: class per image of the cache (n,).
        pools: training indices per source domain, in the order that batches have.
        batch_size: images per domain and step, over all processes.
        seed: of the draws and the augmentation.
        augment: "domainbed", "none" (only normalized), or a name of `POLICIES` or `AUGMENTATIONS`.
        mean: per channel, of images in [0, 1].
        std: likewise.
        workers: threads that prepare the next batches in `stream`; 0 prepares each when it is asked for.
        rank: which of `world` processes this is: it gets images rank, rank + world, … of each domain.
        world: number of processes.
        focus: the domain that gets half of each batch; "" for equal shares.
        class_weights: how often each class is drawn within its domain (`data.loader.cumulated`); "none": as it is.
        originals: what crops are cut from; default: the square images of the cache.
        augment_params: hyper-parameters of a policy.
        n_views: with a policy, how many augmented views a batch has beside the images, which are then only cropped and
            flipped; 0: the images are augmented.
        device: where the batches are wanted. Images travel there as uint8, and are augmented and normalized there; only
            crops of originals of any size, and augmentations of plug-ins, are made on the CPU.

    Raises:
        ConfigError: the batch size cannot be shared evenly by the processes, `focus` is none of the domains, an unknown
            augmentation or hyper-parameter of it, or views of one that has none.
        DataError: there is no domain, or one without training images.
    """

    def __init__(
        self,
        cache: InputCache,
        class_index: npt.NDArray[np.integer],
        pools: Mapping[str, Indices],
        *,
        batch_size: int,
        seed: int,
        augment: str,
        mean: Sequence[float],
        std: Sequence[float],
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
        focus: str = "",
        class_weights: Literal["none", "sqrt", "balanced"] = "none",
        originals: OriginalCache | None = None,
        augment_params: Mapping[str, Value] | None = None,
        n_views: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
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
        if augment not in (*BUILT_IN, *AUGMENTATIONS):
            raise ConfigError(unknown("data.augment", augment, [*BUILT_IN, *AUGMENTATIONS]))
        self.augment = augment
        self.n_views = n_views
        self._policy = PolicyAugmentation(augment, augment_params or {}) if augment in POLICIES else None
        if self._policy is None:
            fill(f"augmentation '{augment}'", {}, augment_params or {})
            if n_views:
                raise ConfigError(f"augmentation '{augment}' has no views; take one of {', '.join(POLICIES)}")
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.workers = workers
        self.originals = originals
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
        everyone = np.concatenate(drawn)
        indices = everyone[rows]
        images, *views = self._inputs(everyone, step, torch.from_numpy(rows))
        sizes = tuple(size // self.world for size in self.sizes)
        labels = upload(torch.from_numpy(self.class_index[indices]), self.device)
        return Batch(images, labels, tuple(self.pools), sizes, tuple(views), torch.from_numpy(indices))

    def _inputs(self, everyone: Indices, step: int, rows: Tensor) -> list[Tensor]:
        if self._policy is None:
            return [self._one_input(everyone, step, rows)]
        indices, n = everyone[rows.numpy()], len(everyone)
        generator = torch_stream(self.seed, "augment", step)
        if self.originals is None:
            images = upload(self.cache.gather(indices, self._buffers), self.device)
            size, sizes = int(images.shape[1]), None
        else:
            images, size = self.originals.gather(indices), self.originals.image_size
            sizes = self.originals.sizes[torch.from_numpy(everyone)]
        options = {"n": n, "size": size, "sizes": sizes, "n_views": max(self.n_views, 1), "device": self.device}
        made = self._policy(images, rows, generator, **options)
        wanted = [made.clean, *made.views] if self.n_views else [made.views[0]]
        return [normalize(one.permute(0, 2, 3, 1), self.mean, self.std) for one in wanted]

    def _one_input(self, everyone: Indices, step: int, rows: Tensor) -> Tensor:
        """Return the images at `everyone[rows]`; the rest of the global batch is that of other processes."""
        indices = everyone[rows.numpy()]
        if self.augment == "none":
            return self.cache.network_inputs(indices, self.mean, self.std, self.device)
        if self.augment == "domainbed":
            return self._domainbed(everyone, step, rows)
        generator = torch_stream(self.seed, "augment", step, self.rank)
        made = AUGMENTATIONS[self.augment](self.cache.gather(indices, self._buffers), generator)
        return normalize(upload(made, self.device), self.mean, self.std)

    def _domainbed(self, everyone: Indices, step: int, rows: Tensor) -> Tensor:
        indices, generator = everyone[rows.numpy()], torch_stream(self.seed, "augment", step)
        if self.originals is None:
            images = self.cache.gather(indices, self._buffers)
            size, sizes = int(images.shape[1]), int(images.shape[1])
        else:
            images, size = self.originals.gather(indices), self.originals.image_size
            sizes = self.originals.sizes[torch.from_numpy(everyone)]
        # Drawn for all processes, so that they see one global batch.
        parameters = draw_parameters(generator, len(everyone), sizes).take(rows)
        if self.device.type == "cpu":
            return augment(images, parameters, size=size, mean=self.mean, std=self.std, pool=self._buffers)
        there = {"size": size, "mean": self.mean, "std": self.std}
        if isinstance(images, Tensor):
            return augment_on_device(upload(images, self.device), parameters, **there)
        crops = upload(crop_and_flip(images, parameters, size).permute(0, 2, 3, 1), self.device)
        return augment_on_device(crops, parameters, crops_made=True, **there)

    def stream(self, start_step: int, end_step: int, ahead: Ahead | None = None) -> Generator[Batch, None, None]:
        """Yield the batches of steps start_step … end_step - 1, the next ones being prepared in the background.

        Close the iterator (or let it be collected) to stop the threads. An error in a thread is raised here.

        Args:
            start_step: the first.
            end_step: behind the last.
            ahead: has each made on a stream of the device (`CudaAhead`); default: as the thread that prepares it does.
        """

        def prepared(step: int) -> Callable[[], Batch]:
            if ahead is not None:
                return ahead(lambda: self.batch(step))
            batch = self.batch(step)
            return lambda: batch

        if self.workers == 0:
            for step in range(start_step, end_step):
                yield prepared(step)()
            return
        pool = single_threaded_pool(self.workers)
        try:
            waiting: deque[Future[Callable[[], Batch]]] = deque()
            for step in range(start_step, end_step):
                waiting.append(pool.submit(prepared, step))
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()()
            while waiting:
                yield waiting.popleft().result()()
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
    cache: InputCache,
    indices: Indices,
    class_index: npt.NDArray[np.integer],
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device = CPU,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) of `indices` in their order, normalized, not augmented, on a device.

    Images are float32 (b, C, H, W) in channels-last memory, labels int64 (b,); the last batch may be smaller.
    """
    labels = class_index.astype(np.int64)
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        yield cache.network_inputs(part, mean, std, device), upload(torch.from_numpy(labels[part]), device)
