"""Images per second of the training data path, against a per-image PIL pipeline with the same operations and size.

    python benchmarks/data_path.py [--data PATH] [--clock cpu] [--profile] [--json FILE]

All run with two workers on the same JPEG files: ours reads a decoded cache (of squares, or of originals with
`data.crop=original`) and augments whole batches in two threads; the other opens each file in a `DataLoader` with two
worker processes and applies torchvision's transforms to the PIL image (random resized crop, flip, color jitter, grey,
to tensor, normalize), as DomainBed does. They are measured in turn, round after round, so that a busy machine slows
all. `--clock cpu` takes the processor time of one thread that does all the work instead, which other work on the
machine moves less. Building the caches is timed apart: it happens once. `--profile` shows where our time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from qtdog.data.decoded_cache import open_cache
from qtdog.data.image_folder import FileDataset, open_folder
from qtdog.data.loader import TrainBatches
from qtdog.data.original_cache import open_originals

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DOMAINS, CLASSES, IMAGES_PER_CLASS, SIDE = 3, 4, 40, 227
BATCH_PER_DOMAIN, WORKERS = 32, 2


def photo_like(rng: np.random.Generator) -> Image.Image:
    """Return a 227 x 227 image with smooth areas, edges and fine noise, so that it compresses like a photo."""
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(smooth)
    for _ in range(12):
        corners = np.sort(rng.integers(0, SIDE, (2, 2)), axis=0).ravel().tolist()
        draw.ellipse(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
    noisy = np.asarray(smooth) + rng.normal(0, 8, (SIDE, SIDE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_jpegs(root: Path) -> None:
    """Write a small data set of synthetic JPEG files."""
    rng = np.random.default_rng(0)
    for d in range(DOMAINS):
        for c in range(CLASSES):
            folder = root / f"domain{d}" / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(IMAGES_PER_CLASS):
                photo_like(rng).save(folder / f"{i:03d}.jpg", quality=90)


class PilImages(Dataset[Any]):
    """The per-image pipeline: open the file, augment the PIL image, make a tensor."""

    def __init__(self, dataset: FileDataset, size: int, n: int) -> None:
        """Hold the paths of n images, drawn with replacement."""
        chosen = np.random.default_rng(0).integers(len(dataset), size=n)
        self.paths = [dataset.path(i) for i in chosen]
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
                transforms.RandomGrayscale(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        """Return one augmented image."""
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


def rate(batches: Iterator[Any], n_batches: int, batch_size: int) -> float:
    """Return images/s over `n_batches`, not counting the start of the workers (the first batches)."""
    for _ in range(2 * WORKERS):
        next(batches)
    start = time.perf_counter()
    for _ in range(n_batches):
        next(batches)
    return n_batches * batch_size / (time.perf_counter() - start)


def rate_of_ours(train: TrainBatches, n_batches: int, clock: str) -> float:
    """Return our images/s."""
    batch_size = BATCH_PER_DOMAIN * len(train.pools)
    if clock == "cpu":
        return cpu_rate(lambda: train.batch(0), lambda i: train.batch(i), n_batches, batch_size)
    stream = train.stream(0, n_batches + 4 * WORKERS)
    try:
        return rate(stream, n_batches, batch_size)
    finally:
        stream.close()


def rate_of_pil(dataset: FileDataset, size: int, n_batches: int, batch_size: int, clock: str) -> float:
    """Return the images/s of the per-image pipeline."""
    images = PilImages(dataset, size, (n_batches + 4 * WORKERS) * batch_size)
    if clock == "cpu":

        def batch(i: int) -> Any:
            return torch.stack([images[j] for j in range(i * batch_size, (i + 1) * batch_size)])

        return cpu_rate(lambda: images[0], batch, n_batches, batch_size)
    loader = DataLoader(images, batch_size=batch_size, num_workers=WORKERS)
    return rate(iter(loader), n_batches, batch_size)


def cpu_rate(warm_up: Callable[[], Any], batch: Callable[[int], Any], n_batches: int, batch_size: int) -> float:
    """Return images per second of processor time; `batch` makes batch i in this thread."""
    warm_up()
    start = time.thread_time()
    for i in range(n_batches):
        batch(i)
    return n_batches * batch_size / (time.thread_time() - start)


def measure(dataset: FileDataset, size: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return rates and ratios at one image size."""
    start = time.perf_counter()
    cache = open_cache(dataset, size, folder=folder)
    built_s = {"cached": time.perf_counter() - start}
    start = time.perf_counter()
    originals = open_originals(dataset, size, folder=folder)
    built_s["original"] = time.perf_counter() - start
    n_bytes = {"cached": cache.path.stat().st_size, "original": originals.path.stat().st_size}
    pools = {domain: dataset.indices(domain) for domain in dataset.domains[:DOMAINS]}
    how = {"batch_size": BATCH_PER_DOMAIN, "seed": 0, "augment": "domainbed", "mean": MEAN, "std": STD}
    sides = {
        crop: TrainBatches(cache, dataset.class_index, pools, workers=WORKERS, originals=source, **how)
        for crop, source in (("cached", None), ("original", originals))
    }
    if options.profile:
        for crop, train in sides.items():
            show_profile(train, f"{size} px, {crop}", max(2, 20 * 96**2 // size**2))
    batch_size = BATCH_PER_DOMAIN * len(pools)
    n_ours, n_pil = max(8, 60 * 96**2 // size**2), max(2, 12 * 96**2 // size**2)
    rates: dict[str, list[float]] = {name: [] for name in (*sides, "pil")}
    for _ in range(options.rounds):
        for crop, train in sides.items():
            rates[crop].append(rate_of_ours(train, n_ours, options.clock))
        rates["pil"].append(rate_of_pil(dataset, size, n_pil, batch_size, options.clock))
    result: dict[str, Any] = {"size_px": size, "rounds": options.rounds, "n_images": len(dataset)}
    result["pil_images_per_s"] = round(statistics.median(rates["pil"]), 1)
    for crop in sides:
        ratios = [a / b for a, b in zip(rates[crop], rates["pil"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        result[crop] = {
            "images_per_s": round(statistics.median(rates[crop]), 1),
            "ratio": round(middle, 2),
            "ratio_q1": round(low, 2),
            "ratio_q3": round(high, 2),
            "built_in_s": round(built_s[crop], 2),
            "bytes": n_bytes[crop],
        }
    return result


def show_profile(train: TrainBatches, title: str, n_batches: int) -> None:
    """Print the processor time of the functions that take more than 1 % of that of a batch, in one thread."""
    train.batch(0)
    profile = cProfile.Profile(time.thread_time)
    for step in range(n_batches):
        profile.runcall(train.batch, step)
    functions = cast(Any, pstats.Stats(profile)).stats
    total = sum(own for _, _, own, _, _ in functions.values())
    n_images = n_batches * BATCH_PER_DOMAIN * len(train.pools)
    print(f"{title}: {total / n_images * 1e6:.0f} µs per image; with what each calls, and alone")
    for (file, _, name), (_, calls, own, whole, _) in sorted(functions.items(), key=lambda entry: -entry[1][3]):
        if whole > 0.01 * total and (own > 0.01 * total or "qtdog" in file):
            shares = f"{whole / total:6.1%} {own / total:6.1%} {calls / n_images:7.2f} calls"
            print(f"  {whole / n_images * 1e6:8.1f} µs {shares} per image  {name}")


def report(results: list[dict[str, Any]]) -> None:
    """Print a table."""
    header = f"{'ours img/s':>11} {'PIL img/s':>10} {'ratio':>6} {'quartiles':>13} {'cache built in':>15} {'MB':>8}"
    print(f"{'size':>5} {'crop':>9} {header}")
    for result in results:
        for crop in ("cached", "original"):
            row = result[crop]
            rates = f"{row['images_per_s']:>11,.0f} {result['pil_images_per_s']:>10,.0f} {row['ratio']:>6.2f}"
            spread = f"{row['ratio_q1']:.2f} - {row['ratio_q3']:.2f}"
            cost = f"{row['built_in_s']:>13.1f} s {row['bytes'] / 1e6:>8,.1f}"
            print(f"{result['size_px']:>5} {crop:>9} {rates} {spread:>13} {cost}")


def main() -> None:
    """Measure at each size and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="ROOT/DOMAIN/CLASS/image; default: synthetic 227 px JPEG files")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--rounds", type=int, default=5, help="measured in turn so many times (at least 2)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="see above; default wall")
    parser.add_argument("--profile", action="store_true", help="also print where our processor time goes")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.data or Path(temporary) / "jpegs"
        if options.data is None:
            make_jpegs(root)
        dataset = open_folder(root)
        results = [measure(dataset, size, options, Path(temporary) / "cache") for size in options.sizes]
    report(results)
    machine = {"cpu": platform.processor() or platform.machine(), "n_cpus": os.cpu_count(), "torch": torch.__version__}
    data = "synthetic" if options.data is None else "given"
    text = json.dumps({"machine": machine, "clock": options.clock, "data": data, "results": results})
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
