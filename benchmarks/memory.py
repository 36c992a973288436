"""Peak memory of reading training batches with 1, 4 and 16 times the images: it should not grow.

    python benchmarks/memory.py [--size PIXELS] [--images N] [--json FILE]
    python benchmarks/memory.py --steps BACKBONE [--size PIXELS] [--json FILE]

Each case runs in a process of its own, which writes a cache file of n images, reads and augments batches that together
touch it twice over, and reports its largest resident memory after any batch: anonymous plus mapped from files, the sum
that `RssAnon` and `RssFile` of /proc/self/status give (Linux). Memory that only the kernel's page cache holds is not
counted.

With `--steps` it measures updates instead: how much the peak resident memory of a process (`VmHWM`) grows in two
updates of a backbone with random weights, with a batch of 16 images of each of five domains in 1, 2 and 4 parts
(`train.accumulate`), for an objective of each kind.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FACTORS = (1, 4, 16)
BATCH = 96
EPOCHS = 2


def resident_mb() -> float:
    """Return the anonymous plus file-mapped resident memory of this process, MB."""
    status = Path("/proc/self/status").read_text()
    return sum(int(kib) * 1024 / 1e6 for kib in re.findall(r"Rss(?:Anon|File):\s+(\d+) kB", status))


def write_cache(path: Path, n: int, size: int) -> None:
    """Write n noise images, a few at a time."""
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        for _ in range(n):
            stream.write(rng.integers(0, 256, size * size * 3, dtype=np.uint8).tobytes())


def case(n: int, size: int) -> None:
    """Read batches from a cache of n images and print the largest resident memory seen."""
    from qtdog.data.decoded_cache import DecodedCache
    from qtdog.data.loader import TrainBatches

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images"
        write_cache(path, n, size)
        pools = {str(d): np.arange(d, n, 3) for d in range(3)}
        train = TrainBatches(
            DecodedCache(path, (n, size, size, 3)),
            np.zeros(n, dtype=np.int16),
            pools,
            batch_size=BATCH // 3,
            seed=0,
            augment="domainbed",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
        peak = max(resident_mb() for _ in train.stream(0, EPOCHS * n // BATCH))
    print(json.dumps({"n_images": n, "cache_mb": round(n * size * size * 3 / 1e6, 1), "peak_mb": round(peak, 1)}))


PARTS = (1, 2, 4)
OBJECTIVES = ("erm", "coral")  # a mean over images, and a loss of the whole batch


def peak_mb() -> float:
    """Return the largest resident memory of this process so far, MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def step_case(backbone: str, size: int, objective: str, n_parts: int) -> None:
    """Make two updates and print by how much they raised the peak memory, and their processor time."""
    from qtdog.core.config import Config
    from qtdog.data.open import open_dataset
    from qtdog.training.build import build_components
    from qtdog.training.loop import begin_step, update

    config = Config.make(
        backbone=backbone,
        weights="none",
        target="75",
        image_size=size,
        batch_size=16,
        objective=objective,
        train={"accumulate": n_parts},
        data={"workers": 0},
    )
    components = build_components(config, open_dataset("rotated-digits"))
    components.network.train()
    batch = components.batches.batch(0)
    before, started = peak_mb(), time.process_time()
    for step in range(2):
        begin_step(components, step)
        update(components, batch, step)
    seconds = (time.process_time() - started) / 2
    result = {"objective": objective, "parts": n_parts, "mb": round(peak_mb() - before), "step_s": round(seconds, 2)}
    print(json.dumps(result))


def measure_steps(backbone: str, size: int, path: Path | None) -> None:
    """Measure updates in 1, 2 and 4 parts, each in a process of its own."""
    results = []
    for objective in OBJECTIVES:
        for n_parts in PARTS:
            command = [sys.executable, __file__, "--steps", backbone, "--size", str(size)]
            command += ["--case", str(n_parts), "--objective", objective]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(results[-1], flush=True)
    if path:
        path.write_text(json.dumps({"backbone": backbone, "size_px": size, "results": results}) + "\n")


def main() -> None:
    """Run the cases and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--images", type=int, default=1500, help="images of the smallest case")
    parser.add_argument("--steps", metavar="BACKBONE", help="measure updates of this backbone in parts instead")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--objective", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args()
    if options.steps and options.case:
        step_case(options.steps, options.size, options.objective, options.case)
        return
    if options.steps:
        measure_steps(options.steps, options.size, options.json)
        return
    if options.case:
        case(options.case, options.size)
        return
    results = []
    for factor in FACTORS:
        command = [sys.executable, __file__, "--size", str(options.size), "--case", str(factor * options.images)]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"{'images':>8} {'cache':>10} {'peak resident':>14} {'against 1x':>11}")
    for result in results:
        ratio = result["peak_mb"] / results[0]["peak_mb"]
        print(f"{result['n_images']:>8,} {result['cache_mb']:>7,.0f} MB {result['peak_mb']:>11,.0f} MB {ratio:>11.3f}")
    text = json.dumps({"size_px": options.size, "batch": BATCH, "results": results})
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
