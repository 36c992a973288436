"""How cost grows with the work: processor time of one thread against size, domains, classes, images and members.

    python benchmarks/cost_growth.py [--quick] [--axes parameters images …] [--json docs/results/runs/cost-growth.json]

A table per axis with the fitted exponent (the slope of log time against log size, all points) and the last one (between
the two largest): 1 means in proportion, 0 not at all. Medians of some repetitions; everything is seeded.

- parameters: one update with LSQ of a vision transformer of 12 layers, whose width grows; 8 images of 64 pixels.
- domains: one update of a small network, with one image of each domain; ERM, and CORAL, which compares all pairs.
- classes: one update of the same network, 48 images.
- images: drawing a batch of 96 from a decoded cache, and dividing the data set, which is done once.
- members: a prediction of an ensemble for 16 images of 64 pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import timm
import torch
from torch import nn

from qtdog.conversion.attach import attach
from qtdog.core.config_io import build_config, load_preset
from qtdog.data.cards import DatasetCard
from qtdog.data.dataset import ImageDataset
from qtdog.data.decoded_cache import DecodedCache
from qtdog.data.loader import TrainBatches
from qtdog.data.splits import make_splits
from qtdog.ensemble.model import EnsembleModel, load_ensemble_model
from qtdog.packing.ensemble_file import save_ensemble
from qtdog.training.build import build_components
from qtdog.training.loop import begin_step, update
from qtdog.training.protocol import resolve

SIZES: dict[str, tuple[list[int], list[int]]] = {  # all, and those of --quick
    "parameters": ([96, 192, 384, 576, 768], [48, 96]),  # width of the transformer
    "domains": ([3, 10, 30, 100, 300], [3, 6]),
    "classes": ([7, 70, 700, 10_000], [7, 70]),
    "images": ([1_000, 10_000, 100_000, 500_000], [1_000, 2_000]),
    "members": ([1, 2, 5, 10, 20], [1, 2]),
}
BACKBONE = "test_resnet.r160_in1k"
Measured = Iterator[tuple[str, float, float]]  # series, size, seconds


class MadeUp(ImageDataset):
    """Grey images of 28 pixels that are made when they are read; classes and domains in equal parts."""

    def __init__(self, n_domains: int, n_classes: int, per_cell: int) -> None:
        self.card = DatasetCard(name="made-up", title="Made up", channels=1)
        self.domains = tuple(f"d{i:04d}" for i in range(n_domains))
        self.classes = tuple(f"c{i:05d}" for i in range(n_classes))
        n = n_domains * n_classes * per_cell
        self.keys = list(map(str, range(n)))
        self.domain_index = (np.arange(n) // (n_classes * per_cell)).astype(np.int16)
        self.class_index = (np.arange(n) // per_cell % n_classes).astype(np.int16)

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i."""
        return np.full((28, 28, 1), i % 256, dtype=np.uint8)

    def sample_signature(self, i: int) -> str:
        """Return the hash of image i."""
        return self.sample_sha256(i)

    def sample_change_ns(self, i: int) -> int:
        """Return 0: nothing changes."""
        return 0

    def sample_sha256(self, i: int) -> str:
        """Return the hash of image i."""
        return hashlib.sha256(bytes([i % 256])).hexdigest()


def seconds(work: Callable[[int], Any], repeats: int) -> float:
    """Return the median processor time of this thread, after one call that does not count."""
    work(0)
    times = []
    for i in range(1, repeats + 1):
        start = time.thread_time()
        work(i)
        times.append(time.thread_time() - start)
    return statistics.median(times)


def of_parameters(widths: Sequence[int], repeats: int) -> Measured:
    """An update with LSQ of transformers of growing width."""
    for width in widths:
        n_parameters, step = transformer_step(width)
        yield "update", n_parameters, seconds(step, repeats)


def transformer_step(width: int) -> tuple[int, Callable[[int], None]]:
    """Return the parameters of a transformer, and a function that makes an update."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": width,
        "num_heads": width // 48,
        "num_classes": 7,
    }
    model = timm.create_model("vit_tiny_patch16_224", **shape).train()
    quantizers = attach(model, bits=7, quantizer="lsq", exclude=["head"])
    quantizers.enable()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(7, (8,))

    def step(i: int) -> None:
        quantizers.begin_step(i, 0.5)
        optimizer.zero_grad()
        with quantizers.groups():
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return sum(parameter.numel() for parameter in model.parameters()), step


def update_seconds(n_domains: int, n_classes: int, batch: int, objective: str, repeats: int) -> float:
    """Return the time of one update of the small network, with its batch."""
    dataset = MadeUp(n_domains, n_classes, max(1, 10 // n_classes))
    changes = {
        "data": {"source": "made-up", "target": "none", "image_size": 28, "batch_size": batch, "workers": 0},
        "objective": {"name": objective},
        "quantizer": {"name": "lsq", "start_step": 0},
        "train": {"steps": 10_000, "eval_every": 10_000},
    }
    config = resolve(build_config([load_preset("digits"), changes]), dataset)
    parts = build_components(config, dataset)
    parts.network.train()

    def step(i: int) -> None:
        begin_step(parts, i)
        update(parts, parts.batches.batch(i), i)

    return seconds(step, repeats)


def of_domains(counts: Sequence[int], repeats: int) -> Measured:
    """An update with one image of each domain."""
    for n in counts:
        for objective in ("erm", "coral"):
            yield objective, n, update_seconds(n, 7, 2 if objective == "coral" else 1, objective, repeats)


def of_classes(counts: Sequence[int], repeats: int) -> Measured:
    """An update with 48 images."""
    for n in counts:
        yield "update", n, update_seconds(3, n, 16, "erm", repeats)


def of_images(counts: Sequence[int], repeats: int) -> Measured:
    """A batch from a cache of so many images, and the division of the data set."""
    size, mean, std = 32, (0.5,), (0.5,)
    for n in counts:
        dataset = MadeUp(4, 10, n // 40)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "images.u8"
            with path.open("wb") as stream:
                stream.truncate(len(dataset) * size * size)  # a file with a hole: no pixel is stored
            cache = DecodedCache(path, (len(dataset), size, size, 1))
            pools = {domain: dataset.indices(domain) for domain in dataset.domains}
            how: dict[str, Any] = {"batch_size": 24, "seed": 0, "augment": "domainbed", "mean": mean, "std": std}
            batches = TrainBatches(cache, dataset.class_index, pools, workers=0, **how)
            yield "batch", n, seconds(batches.batch, 3 * repeats)
        yield "division", n, seconds(lambda i, dataset=dataset: make_splits(dataset, trial=i), min(repeats, 3))


def of_members(counts: Sequence[int], repeats: int) -> Measured:
    """A prediction of an ensemble."""
    script = runpy.run_path(str(Path(__file__).with_name("ensemble_size.py")))
    members = [script["member"](BACKBONE, 7, seed) for seed in range(max(counts))]
    images = torch.randn(16, 3, 64, 64)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "ensemble.safetensors"
        save_ensemble(file, members, script["ABOUT"])
        everyone = load_ensemble_model(file)
    for n in counts:
        model = EnsembleModel(cast(Any, list(everyone.members)[:n]), everyone.info)
        with torch.inference_mode():
            yield "prediction", n, seconds(lambda i, model=model: model(images), repeats)


AXES: dict[str, Callable[[Sequence[int], int], Measured]] = {
    "parameters": of_parameters,
    "domains": of_domains,
    "classes": of_classes,
    "images": of_images,
    "members": of_members,
}


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of log seconds against log size, by least squares.

    Example:
        >>> round(exponent([(1, 2), (10, 200), (100, 20_000)]), 6)
        2.0
    """
    sizes, times = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polyfit(sizes, times, 1)[0])


def measure(axis: str, *, quick: bool, repeats: int) -> dict[str, Any]:
    """Return, for each series of an axis, sizes, seconds and exponents."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name, size, time_s in AXES[axis](SIZES[axis][quick], repeats):
        series.setdefault(name, []).append((size, time_s))
    return {
        name: {"points": points, "exponent": round(exponent(points), 3), "last": round(exponent(points[-2:]), 3)}
        for name, points in series.items()
    }


def report(results: dict[str, Any]) -> None:
    """Print a table, with the times in ms."""
    for axis, found in results.items():
        for name, row in found.items():
            points = "  ".join(f"{size:,.0f}: {1000 * s:.3g}" for size, s in row["points"])
            slopes = f"exponent {row['exponent']:.2f}, last {row['last']:.2f}"
            print(f"{axis:10} {name:10} {slopes}   ms at {points}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="which ones; default all")
    parser.add_argument("--repeats", type=int, default=5, help="measured calls of each point; default 5")
    parser.add_argument("--quick", action="store_true", help="two small sizes of each axis, one call: does it run?")
    parser.add_argument("--json", type=Path, help="also write the results there; axes not measured stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["QTDOG_CACHE"] = place  # the made-up images are nobody's
        for axis in options.axes:
            results[axis] = measure(axis, quick=options.quick, repeats=1 if options.quick else options.repeats)
            report({axis: results[axis]})
    if any(not math.isfinite(row["exponent"]) for found in results.values() for row in found.values()):
        raise SystemExit("a time is zero: take more repetitions")
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.is_file() else {}
        options.json.write_text(json.dumps(known | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
