"""What the checks around a quantizer cost in a training step: the guard of computed weights, the flag, the watch.

    python benchmarks/attach_overhead.py [MODEL …]

Times of the processor, medians: one access of every weight with and without the checks, as a share of a training step.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

import qtdog
from qtdog.conversion.attach import sites
from qtdog.quantizers.computed_weight import ComputedWeight

REPEATS = 200


def median_s(run: Callable[[], object], repeats: int) -> float:
    """Return the median processor time of a call."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return statistics.median(found)


def main(names: list[str]) -> None:
    """Print a line per model."""
    torch.set_num_threads(1)
    for name in names or ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"]:
        model = timm.create_model(name, num_classes=7)
        quantizers = qtdog.attach(model)
        quantizers.enable()
        optimizer = torch.optim.Adam(quantizers.param_groups(lr=1e-4))
        images, labels = torch.randn(8, 3, 224, 224), torch.randint(7, (8,))

        def step() -> None:
            optimizer.zero_grad()  # noqa: B023
            nn.functional.cross_entropy(model(images), labels).backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        found = sites(model)
        values = [site.quantizer(site.weight) for site in found]

        def check() -> None:
            for site, value in zip(found, values, strict=True):  # noqa: B023
                assert site.quantizer.enabled
                value.as_subclass(ComputedWeight)

        step_s, check_s = median_s(step, 8), median_s(check, REPEATS)
        times = f"step {1e3 * step_s:.0f} ms, checks {1e6 * check_s:.0f} us: {check_s / step_s:.3%}"
        print(f"{name}: {len(found)} layers, {times}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
