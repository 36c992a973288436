"""Seconds and layer errors of quantizing a whole network after training, by method and by start of the step sizes.

    python benchmarks/after_training.py [--images N] [--bits B] [--threads N] [--json]

The network is `tf_efficientnet_lite0` at 96 pixels, everything but its classifier quantized per channel, with ImageNet
weights where the package that holds them is installed. The images are PACS (photo, cartoon, art_painting) from
$QTDOG_DATA or ../shared/data, or smooth noise where there is no PACS. Reported for each method: seconds on the clock
and of processor time (decoding the images not counted), and over the layers the median and the largest relative error
of the outputs, tr(D H Dᵀ) / tr(W H Wᵀ).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtdog.conversion.attach import attach
from qtdog.conversion.calibrate import calibrate_
from qtdog.core.random import torch_stream
from qtdog.data.augment import normalize
from qtdog.data.dataset import require_images
from qtdog.data.open import open_dataset
from qtdog.models.backbones import create_network, preprocessing
from qtdog.models.weights import BACKBONE, is_installed
from qtdog.training.finalize import CALIBRATION_BATCH, calibration_indices

SIZE = 96
SOURCES = ("art_painting", "cartoon", "photo")
CASES = [("gptq", "lsq"), ("gptq", "mse"), ("obc", "lsq"), ("obc", "mse")]


def images(n: int) -> tuple[Tensor, str]:
    """Return n images as the network sees them, (n, 3, SIZE, SIZE), and what they are."""
    root = Path(os.environ.get("QTDOG_DATA", "../shared/data")) / "pacs"
    if root.is_dir():
        dataset = require_images(open_dataset(str(root)))
        chosen = calibration_indices({domain: dataset.indices(domain) for domain in SOURCES}, n, seed=0)
        pixels = torch.from_numpy(np.stack([dataset.read_resized(int(index), SIZE) for index in chosen]))
        return normalize(pixels, *preprocessing(BACKBONE)), f"PACS: {', '.join(SOURCES)}"
    coarse = torch.rand(n, 3, 12, 12, generator=torch_stream(0, "noise"))
    smooth = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic")
    return (smooth * 2 - 1).to(memory_format=torch.channels_last), "smooth noise"


def measure(network: nn.Module, batches: list[Tensor], method: str, init: str, bits: int) -> dict[str, Any]:
    """Return the report of one case; the network is left as it is."""
    model = copy.deepcopy(network)
    attach(model, quantizer=method, bits=bits, init=init, exclude=["classifier"])
    started, processor = time.perf_counter(), time.process_time()
    layers = calibrate_(model, method, batches)
    seconds, processor_s = time.perf_counter() - started, time.process_time() - processor
    before = [layer.rounding_error for layer in layers if layer.rounding_error is not None]
    after = [layer.error for layer in layers if layer.error is not None]
    return {
        "method": method,
        "init": init,
        "seconds": round(seconds, 1),
        "processor_s": round(processor_s, 1),
        "solving_s": round(sum(layer.seconds for layer in layers), 1),
        "n_layers": len(layers),
        "other_method": [f"{layer.name}: {layer.method}" for layer in layers if layer.method != method],
        "rows_kept_rounded_frac": round(statistics.mean(layer.rounded_frac for layer in layers), 4),
        "rounding_error": {"median": statistics.median(before), "largest": max(before)},
        "error": {"median": statistics.median(after), "largest": max(after)},
    }


def line(row: dict[str, Any]) -> str:
    """Return one case as a line of the table."""
    errors = f"{row['rounding_error']['median']:.2e} → {row['error']['median']:.2e}"
    largest = f"{row['rounding_error']['largest']:.2e} → {row['error']['largest']:.2e}"
    seconds = (
        f"{row['seconds']:7.1f} s ({row['processor_s']:.1f} s of processor time, {row['solving_s']:.1f} s solving)"
    )
    kept = f"{row['rows_kept_rounded_frac']:.1%} of the rows kept rounding"
    return f"  {row['method']:4s} {row['init']:4s} {seconds}  median error {errors}, largest {largest}; {kept}"


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    inputs, what = images(arguments.images)
    weights = "imagenet" if is_installed() else "none"
    network = create_network(
        BACKBONE, n_classes=7, channels=3, image_size=SIZE, weights=weights, freeze_bn=True, seed=0
    )
    batches = list(inputs.split(CALIBRATION_BATCH))
    setting = {"images": len(inputs), "of": what, "weights": weights, "bits": arguments.bits}
    if not arguments.json:
        print(f"{BACKBONE} at {SIZE} pixels: {setting}, {arguments.threads} threads")
    rows = []
    for method, init in CASES:
        rows.append(measure(network, batches, method, init, arguments.bits))
        if not arguments.json:
            print(line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps(setting | {"threads": arguments.threads, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
