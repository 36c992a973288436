"""What local flatness costs in plain passes: 100 directions × 13 radii may take the time of 1,300 passes.

    python benchmarks/flatness_cost.py --run runs/pacs-lite --images 16

A pass is one evaluation of the loss on the same images with the weights left alone. The whole measurement is timed,
with its table and figure, and as many plain passes as it has directions and radii, half of them before and half after.
Processor time is compared, which depends little on what else runs; the clock is told too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qtdog.analysis.analyzed_run import all_images, losses_by_domain, open_analyzed_runs
from qtdog.analysis.flatness import RADII, FlatnessPlan, measure_flatness


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", help="where the data set lies now")
    parser.add_argument("--images", type=int, default=16, help="of each domain")
    parser.add_argument("--directions", type=int, default=100, help="even, 4 or more")
    return parser.parse_args()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of processor time and of the clock that something takes."""
    processor, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - clock


def main() -> None:
    """Measure and print one JSON document."""
    given = arguments()
    (run,) = open_analyzed_runs([given.run], ["run"], data=given.data)
    images = all_images(run, given.images, 0)
    plan = FlatnessPlan({"absolute": RADII["absolute"]}, given.directions, given.images, 0)
    allowed = given.directions * len(RADII["absolute"])

    def plain() -> None:
        for _ in range(allowed // 2):
            losses_by_domain(run.model, images)

    losses_by_domain(run.model, images)  # warm up
    before = timed(plain)
    with tempfile.TemporaryDirectory() as folder:
        whole = timed(lambda: measure_flatness([run], plan, Path(folder)))
    after = timed(plain)
    pass_s, pass_clock_s = ((one + other) / 2 / (allowed // 2) for one, other in zip(before, after, strict=True))
    report = {
        "images": sum(len(part.labels) for part in images.values()),
        "directions": given.directions,
        "pass_s": round(pass_s, 4),
        "pass_s_before_and_after": [round(part[0] / (allowed // 2), 4) for part in (before, after)],
        "flatness_s": round(whole[0], 2),
        "passes": round(whole[0] / pass_s, 1),
        "passes_by_the_clock": round(whole[1] / pass_clock_s, 1),
        "allowed": allowed,
        "torch": torch.__version__,
        "n_threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
