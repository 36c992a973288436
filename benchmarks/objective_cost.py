"""Cost of a training step with every registered objective, as a multiple of a step with ERM.

    python benchmarks/objective_cost.py [--backbone NAME] [--size PIXELS] [--batch N] [--quantizer NAME]
                                        [--objectives NAME …] [--repeats N] [--threads N] [--clock wall|cpu] [--json]

Each objective trains a network of its own from random weights, quantized from the first step, on one batch of the
rotated digits with five source domains; all in one process. A round makes one update of each, in rotating order, with
the very function of the training loop, and the ratio to ERM's update in the same round is what counts. Reported: the
median of these paired ratios, with its quartiles. The steps are late ones, at which every penalty has set in. Loading
images is not in it. On a busy machine the processor's clock tells more than that on the wall.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from qtdog.core.config import Config
from qtdog.core.config_io import build_config, load_preset
from qtdog.data.known_datasets import RotatedDigits
from qtdog.models.feature_layers import FEATURE_LAYERS
from qtdog.objectives.base import OBJECTIVES
from qtdog.training.build import build_components
from qtdog.training.loop import begin_step, update
from qtdog.training.protocol import resolve

LATE = 10**6  # of the step: no penalty waits any longer
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[int], None]


def make_config(name: str, arguments: argparse.Namespace) -> Config:
    """Return the configuration of a run with the objective `name`, and what it needs in the network."""
    layers = [layer for layer in FEATURE_LAYERS if name in FEATURE_LAYERS[layer].OBJECTIVES]
    changes = {
        "data": {"target": "75", "image_size": arguments.size, "batch_size": arguments.batch},
        "model": {"backbone": arguments.backbone, "feature_layer": layers[0] if layers else "none"},
        "objective": {"name": name},
        "quantizer": {"name": arguments.quantizer, "start_step": 0},
        "optimizer": {"lr": 1e-6},
        "train": {"steps": LATE},
    }
    return build_config([load_preset("digits"), changes])


def make_step(name: str, arguments: argparse.Namespace, dataset: RotatedDigits) -> Step:
    """Return a function that makes one update."""
    config = resolve(make_config(name, arguments), dataset)
    parts = build_components(config, dataset)
    batch = parts.batches.batch(0)
    parts.network.train()

    def step(number: int) -> None:
        begin_step(parts, number)
        update(parts, batch, LATE + number).item()  # on a GPU, wait until it is done

    return step


def measure(steps: dict[str, Step], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of every update of every objective, round by round; the first two rounds are dropped."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(repeats + 2):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            steps[name](index)
            times[name].append(clock() - start)
    return {name: values[2:] for name, values in times.items()}


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return, per objective, the median time of an update in seconds and the quartiles of its paired ratio to ERM."""
    result = {}
    for name, values in times.items():
        ratios = [value / reference for value, reference in zip(values, times["erm"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = {"step_s": statistics.median(values), "ratio": middle, "ratio_q1": low, "ratio_q3": high}
        result[name] = {key: round(value, 4) for key, value in row.items()}
    return result


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images per domain, of five")
    parser.add_argument("--quantizer", default="lsq", help="or 'none'")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="besides erm; default all")
    parser.add_argument("--repeats", type=int, default=11, help="measured rounds (at least 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> None:
    """Measure, and print a table or JSON."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    dataset = RotatedDigits()
    names = ["erm", *(name for name in arguments.objectives if name != "erm")]
    steps = {name: make_step(name, arguments, dataset) for name in names}
    results = summary(measure(steps, arguments.repeats, CLOCKS[arguments.clock]))
    if arguments.json:
        print(json.dumps({"options": vars(arguments), "results": results}, indent=1))
        return
    print(f"{arguments.backbone} at {arguments.size}, 5 × {arguments.batch} images, quantizer {arguments.quantizer}")
    print(f"{arguments.threads} threads, {arguments.repeats} rounds, time by the {arguments.clock} clock")
    for name, row in results.items():
        spread = f"{row['ratio_q1']:.3f} … {row['ratio_q3']:.3f}"
        print(f"  {name:12s} {row['step_s'] * 1e3:8.1f} ms   {row['ratio']:.3f} × erm   (quartiles {spread})")


if __name__ == "__main__":
    main()
