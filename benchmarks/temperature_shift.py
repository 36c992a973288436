"""Can corrupted images of the sources choose a temperature that holds on an unseen domain?

    python benchmarks/temperature_shift.py RUN … --data DATA

RUN is a folder of a finished run with an unseen domain. Temperatures are fitted on its held-out source images: clean
ones (as every run does), the largest of its source domains, and copies under the corruptions of `qtdog eval --corrupt`
at each severity and at all five together; the corruptions take turns over the images. Printed are T and the expected
calibration error (15 bins) on the unseen domain and on the clean held-out images, for each run and as the mean over the
runs of each unseen domain. The last column is fitted on the unseen domain itself: the least that one temperature could
reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qtdog.analysis.analyzed_run import AnalyzedRun, Images, domain_images, logits, open_analyzed_runs
from qtdog.data.corruptions import SEVERITIES, corrupt, corruption_names
from qtdog.training.calibration import expected_calibration_error, fit_temperature

Fits = Mapping[str, tuple[float, float, float]]
"""By the images that were fitted on: T, calibration error on the unseen domain, and on the sources."""


def corrupted(images: Images, severity: int, keys: list[int]) -> Images:
    """Return copies of images, each under the next corruption."""
    names = corruption_names(["all"])
    pixels = images.pixels.permute(0, 3, 1, 2).contiguous()
    for first, name in enumerate(names):
        rows = list(range(first, len(pixels), len(names)))
        if rows:
            pixels[rows] = corrupt(pixels[rows], name, severity, keys=[keys[row] for row in rows])
    return replace(images, pixels=pixels.permute(0, 2, 3, 1))


def in_order(images: Images, drawn: np.ndarray) -> Images:
    """Return images, which are sorted, in the random order in which their split was drawn."""
    order = np.searchsorted(np.sort(drawn), drawn)
    return Images(images.pixels[order], images.labels[order], tuple(images.keys[row] for row in order))


def fits_of(run: AnalyzedRun) -> Fits:
    """Return what each way of fitting gives on one run."""
    position = {key: index for index, key in enumerate(run.dataset.keys)}
    clean: list[tuple[Tensor, Tensor]] = []
    changed: dict[int, list[Tensor]] = {severity: [] for severity in SEVERITIES}
    for domain in run.protocol.sources:
        images = in_order(domain_images(run, domain, None, 0), run.protocol.splits[domain].heldout)
        clean.append((logits(run.model, images), images.labels))
        for severity, found in changed.items():
            keys = [position[key] for key in images.keys]
            found.append(logits(run.model, corrupted(images, severity, keys)))
    source, labels = (torch.cat(column) for column in zip(*clean, strict=True))
    under = {severity: torch.cat(found) for severity, found in changed.items()}
    unseen = domain_images(run, str(run.target), None, 0)
    target = logits(run.model, unseen)
    temperatures = {"T = 1": 1.0, "clean": fit_temperature(source, labels)}
    temperatures["largest domain"] = max(fit_temperature(*one) for one in clean)
    temperatures |= {f"severity {severity}": fit_temperature(found, labels) for severity, found in under.items()}
    temperatures["all"] = fit_temperature(torch.cat(list(under.values())), labels.repeat(len(under)))
    temperatures["unseen itself"] = fit_temperature(target, unseen.labels)
    return {
        name: (
            temperature,
            expected_calibration_error((target / temperature).softmax(1), unseen.labels),
            expected_calibration_error((source / temperature).softmax(1), labels),
        )
        for name, temperature in temperatures.items()
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    by_target: dict[str, list[Fits]] = {}
    for path in options.runs:
        (run,) = open_analyzed_runs([path], [path.name], data=options.data)
        found = fits_of(run)
        by_target.setdefault(str(run.target), []).append(found)
        cells = (f"{name} {t:.2f}: {unseen:.3f}, {source:.3f}" for name, (t, unseen, source) in found.items())
        print(f"{path.name} ({run.target})  {'; '.join(cells)}", flush=True)
    groups = {**by_target, "all": [found for group in by_target.values() for found in group]}
    for part, index in (("unseen", 1), ("sources", 2)):
        print(f"\n| ECE, {part} | runs | {' | '.join(groups['all'][0])} |")
        print("| --- " * (2 + len(groups["all"][0])) + "|")
        for target, group in groups.items():
            means = [float(np.mean([found[name][index] for found in group])) for name in group[0]]
            print(f"| {target} | {len(group)} | {' | '.join(f'{mean:.3f}' for mean in means)} |")


if __name__ == "__main__":
    main()
