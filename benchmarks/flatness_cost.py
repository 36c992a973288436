"""What local flatness costs in plain passes: 100 directions × 13 radii may take the time of 1,300 passes.

    python benchmarks/flatness_cost.py --run runs/pacs-lite --images 8 --directions 4

A pass is one evaluation of the loss on the same images with the weights left alone. The measurement of a few directions
is scaled to all, table and figure are added once. Processor time is compared, which depends little on what else runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from qtdog.analysis.flatness_study import RADII, FlatnessPlan, measure_flatness
from qtdog.analysis.passes import losses_by_domain
from qtdog.analysis.subject import all_images, open_subjects

ALLOWED = 1300


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--images", type=int, default=8, help="of each domain")
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--passes", type=int, default=20, help="plain passes that are timed, before and after")
    return parser.parse_args()


def main() -> None:
    """Measure and print one JSON document."""
    given = arguments()
    (subject,) = open_subjects([given.run], ["run"])
    images = all_images(subject, given.images, 0)
    losses_by_domain(subject.model, images)  # warm up

    def plain() -> float:
        begun = time.process_time()
        for _ in range(given.passes):
            losses_by_domain(subject.model, images)
        return (time.process_time() - begun) / given.passes

    before = plain()
    plan = FlatnessPlan({"absolute": RADII["absolute"]}, given.directions, given.images, 0)
    with tempfile.TemporaryDirectory() as folder:

        def measured() -> float:
            begun = time.process_time()
            measure_flatness([subject], plan, Path(folder))
            return time.process_time() - begun

        whole = measured()
        fixed = measured()  # again: all points are kept, so that only table and figure are made
    pass_s = (before + plain()) / 2
    per_direction = (whole - fixed) / pass_s / given.directions
    report = {
        "images": sum(len(part.labels) for part in images.values()),
        "pass_s": round(pass_s, 4),
        "directions": given.directions,
        "points_s": round(whole - fixed, 2),
        "figure_s": round(fixed, 2),
        "passes_per_direction": round(per_direction, 2),
        "passes_for_100_directions": round(100 * per_direction + fixed / pass_s),
        "allowed": ALLOWED,
        "torch": torch.__version__,
        "n_threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
