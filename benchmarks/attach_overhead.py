"""What the checks around a quantizer cost in a training step: the guard of computed weights, the flag, the watch.

    python benchmarks/attach_overhead.py [--models NAME …] [--rounds N]

Two answers. "Paired": two equal LSQ models, one attached, one with the same quantizers registered bare, take turns, one
step in every round; the median of the ratios with its 95 % interval. "Alone": what the checks of one step take, as a
share of the step. Times of the processor, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.optimizer import Optimizer

import qtdog
from qtdog.conversion.attach import sites
from qtdog.conversion.layers import find_layers
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.computed_weight import ComputedWeight
from qtdog.quantizers.lsq import LSQ

CASES = {"tf_efficientnet_lite0": (96, 32), "resnet18": (96, 32), "vit_tiny_patch16_224": (224, 8)}  # pixels, batch
REPEATS = 200


class BareLSQ(LSQ):
    """LSQ that does not ask whether it is enabled."""

    enabled = True  # pyright: ignore[reportAssignmentType]


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def attach_checked(model: nn.Module) -> Optimizer:
    """Attach as a user does."""
    quantizers = qtdog.attach(model)
    quantizers.enable()
    return torch.optim.Adam(quantizers.param_groups(lr=1e-4))


def attach_bare(model: nn.Module) -> Optimizer:
    """Register the same quantizers without any check."""
    step_sizes: list[nn.Parameter] = []
    weights = list(model.parameters())
    for layer in find_layers(model):
        quantizer = BareLSQ(layer.weight, QuantSpec(7, layer.axis))
        quantizer.enable_(layer.weight)
        step_sizes.append(quantizer.log_scale)
        register_parametrization(layer.module, layer.tensor_name, quantizer)
    return torch.optim.Adam([{"params": weights}, {"params": step_sizes}], lr=1e-4)


def stepping(model: nn.Module, optimizer: Optimizer, pixels: int, batch: int) -> Callable[[], None]:
    """Return what makes one training step."""
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(7, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def checks(model: nn.Module) -> Callable[[], None]:
    """Return what makes the checks of one step and nothing else."""
    found = sites(model)
    values = [site.quantizer(site.weight) for site in found]

    def check() -> None:
        for site, value in zip(found, values, strict=True):
            assert site.quantizer.enabled
            weight = value.as_subclass(ComputedWeight)
            ComputedWeight.__torch_function__(read, (ComputedWeight,), (weight,))  # what reads it, the layer's own work

    return check


def read(weight: torch.Tensor) -> None:
    """Stand for the operation of a layer, at no cost."""


def main() -> None:
    """Print a line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        steps = []
        for attach in (attach_checked, attach_bare):
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=7)
            steps.append((model, stepping(model, attach(model), *CASES[name])))
        for _, step in steps:
            step()
        ratios, times = [], []
        for turn in range(options.rounds):
            order = (0, 1) if turn % 2 else (1, 0)
            took = {index: seconds(steps[index][1]) for index in order}
            ratios.append(took[0] / took[1])
            times.append(took[0])
        step_s = statistics.median(times)
        error = 1.96 * 1.253 * statistics.stdev(ratios) / options.rounds**0.5  # of a median of normal values
        check = checks(steps[0][0])
        check_s = statistics.median(seconds(check) for _ in range(REPEATS))
        pixels, batch = CASES[name]
        paired = f"paired {statistics.median(ratios) - 1:+.2%} ± {error:.2%}"
        alone = f"alone {1e6 * check_s:.0f} us, {check_s / step_s:.3%}"
        print(f"{name}, {batch} × {pixels} px, step {1e3 * step_s:.0f} ms: {paired}; {alone}", flush=True)


if __name__ == "__main__":
    main()
