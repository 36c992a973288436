"""Images per second of the training data path, against a per-image PIL pipeline with the same operations and size.

    python benchmarks/data_path.py [--data PATH] [--json FILE]

All run with two workers on the same JPEG files: ours reads a decoded cache (of squares, or of originals with
`data.crop=original`) and augments whole batches in two threads; the other opens each file in a `DataLoader` with two
worker processes and applies torchvision's transforms to the PIL image (random resized crop, flip, colour jitter, grey,
to tensor, normalise), as DomainBed does. They are measured in turn, round after round, so that a busy machine slows
all. Building the caches is timed apart: it happens once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def rate_of_ours(train: TrainBatches, n_batches: int) -> float:
    """Return our images/s."""
    stream = train.stream(0, n_batches + 4 * WORKERS)
    try:
        return rate(stream, n_batches, BATCH_PER_DOMAIN * len(train.pools))
    finally:
        stream.close()


def rate_of_pil(dataset: FileDataset, size: int, n_batches: int, batch_size: int) -> float:
    """Return the images/s of the per-image pipeline."""
    images = PilImages(dataset, size, (n_batches + 4 * WORKERS) * batch_size)
    loader = DataLoader(images, batch_size=batch_size, num_workers=WORKERS)
    return rate(iter(loader), n_batches, batch_size)


def measure(dataset: FileDataset, size: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return rates and ratios at one image size."""
    start = time.perf_counter()
    cache = open_cache(dataset, size, folder=folder)
    build_s = time.perf_counter() - start
    start = time.perf_counter()
    originals = open_originals(dataset, size, folder=folder)
    build_originals_s = time.perf_counter() - start
    pools = {domain: dataset.indices(domain) for domain in dataset.domains[:DOMAINS]}
    how = {"batch_size": BATCH_PER_DOMAIN, "seed": 0, "augment": "domainbed", "mean": MEAN, "std": STD}
    train, of_originals = (
        TrainBatches(cache, dataset.class_index, pools, workers=WORKERS, originals=source, **how)
        for source in (None, originals)
    )
    batch_size = BATCH_PER_DOMAIN * len(pools)
    n_ours, n_pil = max(8, 60 * 96**2 // size**2), max(4, 12 * 96**2 // size**2)
    ours, ours_of_originals, pil = [], [], []
    for _ in range(rounds):
        ours.append(rate_of_ours(train, n_ours))
        ours_of_originals.append(rate_of_ours(of_originals, n_ours))
        pil.append(rate_of_pil(dataset, size, n_pil, batch_size))
    ratios = [a / b for a, b in zip(ours, pil, strict=True)]
    ratios_of_originals = [a / b for a, b in zip(ours_of_originals, pil, strict=True)]
    return {
        "size_px": size,
        "originals_images_per_s": round(statistics.median(ours_of_originals), 1),
        "originals_ratio_median": round(statistics.median(ratios_of_originals), 2),
        "originals_ratio_min": round(min(ratios_of_originals), 2),
        "originals_ratio_max": round(max(ratios_of_originals), 2),
        "originals_build_s": round(build_originals_s, 2),
        "cache_bytes": cache.path.stat().st_size,
        "originals_bytes": originals.path.stat().st_size,
        "ours_images_per_s": round(statistics.median(ours), 1),
        "pil_images_per_s": round(statistics.median(pil), 1),
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "rounds": rounds,
        "cache_build_s": round(build_s, 2),
        "n_images": len(dataset),
    }


def report(results: list[dict[str, Any]]) -> None:
    """Print a table."""
    header = f"{'ours img/s':>11} {'PIL img/s':>10} {'ratio':>6} {'min - max':>13} {'cache built in':>15} {'MB':>8}"
    print(f"{'size':>5} {'crop':>9} {header}")
    for r in results:
        for crop, prefix, rate_key, size_key, build in (
            ("cached", "", "ours_images_per_s", "cache_bytes", "cache_build_s"),
            ("original", "originals_", "originals_images_per_s", "originals_bytes", "originals_build_s"),
        ):
            spread = f"{r[f'{prefix}ratio_min']:.2f} - {r[f'{prefix}ratio_max']:.2f}"
            rates = f"{r[rate_key]:>11,.0f} {r['pil_images_per_s']:>10,.0f} {r[f'{prefix}ratio_median']:>6.2f}"
            cost = f"{r[build]:>13.1f} s {r[size_key] / 1e6:>8,.1f}"
            print(f"{r['size_px']:>5} {crop:>9} {rates} {spread:>13} {cost}")


def main() -> None:
    """Measure at each size and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="ROOT/DOMAIN/CLASS/image; default: synthetic 227 px JPEG files")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.data or Path(temporary) / "jpegs"
        if options.data is None:
            make_jpegs(root)
        dataset = open_folder(root)
        results = [measure(dataset, size, options.rounds, Path(temporary) / "cache") for size in options.sizes]
    report(results)
    machine = {"cpu": platform.processor() or platform.machine(), "n_cpus": os.cpu_count(), "torch": torch.__version__}
    text = json.dumps(
        {"machine": machine, "data": "synthetic" if options.data is None else "given", "results": results}
    )
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
