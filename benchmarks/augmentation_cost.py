"""Time to make a batch with every augmentation, and its share of a training step, relative to `domainbed`.

    python benchmarks/augmentation_cost.py [--size PIXELS] [--batch N] [--backbone NAME] [--repeats N] [--no-step]
                                           [--clock wall|cpu] [--json]

One process, one thread; random images, decoded. A round makes one batch with each augmentation in rotating order, and
the ratio to `domainbed` in the same round is what counts: the median of these paired ratios, with its quartiles. A step
is the batch plus an update of ERM on the backbone (random weights, in float, the batch not overlapped), timed once per
round as well. `augmix+consistency` makes the clean images and two views, and its update passes over all three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qtdog.data.augment import CPU, BufferPool
from qtdog.data.augment_policies import POLICIES
from qtdog.data.decoded_cache import Indices, InputCache
from qtdog.data.loader import TrainBatches
from qtdog.models.backbones import create_network
from qtdog.models.network import Network
from qtdog.objectives.wrappers import jensen_shannon

N_IMAGES, N_DOMAINS, N_CLASSES = 256, 3, 7


class RandomImages(InputCache):
    """Smooth random images in memory."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = 255 * torch.rand((N_IMAGES, 3, 8, 8), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        self.images = smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def __len__(self) -> int:
        return N_IMAGES

    def gather(self, indices: Indices, pool: BufferPool | None = None) -> Tensor:
        """Return the images at `indices`."""
        return self.images[torch.from_numpy(indices)]

    def network_inputs(self, indices: Indices, mean: object, std: object, device: torch.device = CPU) -> Tensor:
        """Return them as the network takes them."""
        return self.gather(indices).permute(0, 3, 1, 2).to(device).float() / 255


def make_batches(name: str, cache: RandomImages, batch: int) -> TrainBatches:
    """Return the batches of an augmentation; "augmix+consistency" has two views."""
    pools = {str(d): np.arange(d, N_IMAGES, N_DOMAINS) for d in range(N_DOMAINS)}
    augment, views = name.partition("+")[::2]
    how = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "workers": 0, "n_views": 2 if views else 0}
    return TrainBatches(cache, np.arange(N_IMAGES) % N_CLASSES, pools, batch_size=batch, seed=0, augment=augment, **how)


def make_update(network: Network) -> Callable[[list[Tensor], Tensor], None]:
    """Return a function that makes one update from images and views."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-6)

    def update(images: list[Tensor], labels: Tensor) -> None:
        logits = network(torch.cat(images)).split(len(labels))
        loss = torch.nn.functional.cross_entropy(logits[0], labels)
        if len(images) > 1:
            loss = loss + 12 * jensen_shannon(logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32, help="images per domain, of three domains")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-step", action="store_true")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu", help="on a busy machine cpu tells more")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    cache = RandomImages(arguments.size)
    names = ["domainbed", "none", *POLICIES, "augmix+consistency"]
    batches = {name: make_batches(name, cache, arguments.batch) for name in names}
    network = create_network(
        arguments.backbone,
        n_classes=N_CLASSES,
        channels=3,
        image_size=arguments.size,
        weights="none",
        freeze_bn=True,
        seed=0,
    ).train()
    update = make_update(network)
    made: dict[str, list[float]] = {name: [] for name in names}
    steps: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            batch = batches[name].batch(turn)
            made[name].append(clock() - start)
            if not arguments.no_step:
                update([batch.images, *batch.views], batch.labels)
                steps[name].append(clock() - start)
    rows = {}
    for name in names:
        rows[name] = {"batch_s": statistics.median(made[name][1:]), "batch": ratios(made, name)}
        if not arguments.no_step:
            rows[name] |= {"step_s": statistics.median(steps[name][1:]), "step": ratios(steps, name)}
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for name, row in rows.items():
        texts = [f"{row[f'{what}_s'] * 1e3:8.1f} ms {shown(row[what])}" for what in ("batch", "step") if what in row]
        print(f"{name:20} " + "   ".join(texts))


def ratios(times: dict[str, list[float]], name: str) -> list[float]:
    """Return the quartiles of the paired ratios to domainbed; the first round is dropped."""
    pairs = zip(times[name][1:], times["domainbed"][1:], strict=True)
    return [round(value, 3) for value in statistics.quantiles([own / base for own, base in pairs], n=4)]


def shown(quartiles: list[float]) -> str:
    """Return a median with its quartiles."""
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
