"""Draw the pictures of the concept pages and of the README, each for light and for dark pages.

    python docs/make/drawings.py            # writes docs/concepts/*.svg and docs/results/*.svg

The accuracies come from docs/results/runs; the other drawings explain and measure nothing.
"""

from __future__ import annotations

import json
import runpy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

DOCS = Path(__file__).parents[1]
RUNS = DOCS / "results" / "runs"
BLUE, ORANGE, GREEN, PURPLE = "#3b82c4", "#d9822b", "#2f9e6e", "#a569bd"  # readable on white and on black
INK = {"light": "#222222", "dark": "#dddddd"}


def style(theme: str) -> dict[str, Any]:
    """Return matplotlib's settings for a theme: transparent, small, the same bytes every time."""
    ink = INK[theme]
    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(colored, ink) | {
        "svg.fonttype": "none",
        "svg.hashsalt": "qtdog",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "savefig.transparent": True,
    }


def minima() -> Figure:
    """A sharp and a flat minimum, and what a step of the grid does to the loss in each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    w = np.linspace(-3.2, 3.2, 600)

    def loss(x: Any) -> Any:
        return 1.25 - 1.0 * np.exp(-((x + 1.6) ** 2) / 0.045) - 0.95 * np.exp(-((x - 1.3) ** 2) / 1.5)

    step = 0.8
    left.plot(w, loss(w), color=BLUE, lw=2)
    for at, name in ((-1.6, "sharp"), (1.3, "flat")):
        left.axvspan(at - step / 2, at + step / 2, color=ORANGE, alpha=0.18, lw=0)
        left.plot([at], [loss(at)], "o", color=BLUE)
        left.text(at, 0.02, name, ha="center")
    left.set(ylim=(-0.08, 1.5), yticks=[], xticks=[], xlabel="weight w", ylabel="training loss L(w)", title="float")
    left.text(-0.1, 1.38, "band: w ± s/2", color=ORANGE, ha="center")
    radius = np.linspace(-step / 2, step / 2, 41)
    mean = np.array([loss(x + radius).mean() for x in w])
    right.plot(w, loss(w), color=BLUE, lw=1, alpha=0.45)
    right.plot(w, mean, color=ORANGE, lw=2)
    grid = np.arange(-3.2, 3.3, step)
    right.plot(grid, np.full(len(grid), -0.03), "|", color=GREEN, ms=10, mew=2)
    best = w[mean.argmin()]
    right.plot([best], [mean.min()], "o", color=ORANGE)
    right.text(best, mean.min() - 0.18, "preferred", ha="center")
    right.set(
        ylim=(-0.08, 1.5), yticks=[], xticks=[], xlabel="weight w and its grid", title="quantized: mean of L(w + Δ)"
    )
    return figure


def timeline() -> Figure:
    """When quantization begins, and which checkpoints can be selected."""
    figure, axes = plt.subplots(figsize=(9, 2.5), layout="constrained")
    start, end = 0.4, 1.0
    axes.add_patch(Rectangle((0, 0.5), start, 0.22, color=BLUE, alpha=0.75, lw=0))
    axes.add_patch(Rectangle((start, 0.5), end - start, 0.22, color=ORANGE, alpha=0.8, lw=0))
    axes.text(start / 2, 0.61, "float weights", ha="center", va="center", color="white")
    axes.text(
        (start + end) / 2, 0.61, "weights on a grid of step size s; both train", ha="center", va="center", color="white"
    )
    line = {"arrowstyle": "-", "color": "gray"}
    text = "start step (40 %): s is set\nfrom the weights of now"
    axes.annotate(text, (start, 0.72), (start, 0.84), ha="center", va="bottom", arrowprops=line)
    for k in range(1, 11):
        axes.plot([k / 10], [0.4], "v", color=GREEN if k > 4 else "gray", ms=8)
    axes.text(0, 0.26, "evaluations of the sources' validation split", ha="left", va="center", color="gray")
    axes.text(1, 0.26, "checkpoints that can be selected", ha="right", va="center", color=GREEN)
    axes.annotate("", (1.02, 0.12), (0, 0.12), arrowprops={"arrowstyle": "->", "color": "gray"})
    axes.text(1.02, 0.03, "steps", ha="right", va="center")
    axes.set(xlim=(-0.01, 1.03), ylim=(-0.04, 1.18))
    axes.axis("off")
    return figure


def splits() -> Figure:
    """Which images of which domain serve for what."""
    figure, axes = plt.subplots(figsize=(9, 3.3), layout="constrained")
    rows = [("hospital_a", False), ("hospital_b", False), ("hospital_d", False), ("hospital_c (target)", True)]
    for row, (name, is_target) in enumerate(rows):
        y = 3 - row
        axes.text(-0.02, y + 0.35, name, ha="right", va="center")
        if is_target:
            axes.add_patch(Rectangle((0, y), 1, 0.7, color=PURPLE, alpha=0.8, lw=0))
            axes.text(
                0.5,
                y + 0.35,
                "test: measured, and seen by nothing that decides",
                ha="center",
                va="center",
                color="white",
            )
        else:
            axes.add_patch(Rectangle((0, y), 0.795, 0.7, color=BLUE, alpha=0.75, lw=0))
            axes.add_patch(Rectangle((0.805, y), 0.195, 0.7, color=GREEN, alpha=0.8, lw=0))
            axes.text(0.4, y + 0.35, "training split, 80 %", ha="center", va="center", color="white")
            axes.text(0.9, y + 0.35, "validation, 20 %", ha="center", va="center", color="white", size=9)
    uses = [("gradients · calibration", 0.4, BLUE), ("selection", 0.9, GREEN)]
    for text, x, color in uses:
        axes.text(x, 4.0, text, ha="center", va="center", color=color)
    axes.set(xlim=(-0.28, 1.02), ylim=(-0.15, 4.3))
    axes.axis("off")
    return figure


def ensemble() -> Figure:
    """Members that share their float steps, one file, one answer."""
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=color, lw=2))

    fork = (0.3, 0.5)
    axes.plot([0.02, fork[0]], [0.5, 0.5], color=BLUE, lw=4)
    axes.text(0.15, 0.56, "float steps, once", ha="center")
    axes.plot(*fork, "o", color=BLUE, ms=9)
    axes.text(fork[0], 0.39, "fork point", ha="center")
    for k in range(5):
        y = 0.9 - 0.2 * k
        arrow(fork, (0.56, y), ORANGE)
        axes.text(0.57, y, f"seed {k}", va="center")
        axes.plot([0.645, 0.72], [y, 0.5], color="gray", lw=1)
    axes.add_patch(Rectangle((0.72, 0.38), 0.12, 0.24, color=GREEN, alpha=0.85, lw=0))
    axes.text(0.78, 0.5, "one file\n7 bit each", ha="center", va="center", color="white")
    arrow((0.85, 0.5), (0.92, 0.5), "gray")
    axes.text(0.925, 0.5, "mean of\nthe logits", va="center")
    axes.set(xlim=(0, 1.06), ylim=(0, 1))
    axes.axis("off")
    return figure


class Point(NamedTuple):
    """One method in the picture of the README.

    Attributes:
        label: its name.
        n_bytes: of the file.
        accuracy: on the unseen art paintings, in percent.
        error: standard error over seeds; None for one ensemble.
    """

    label: str
    n_bytes: float
    accuracy: float
    error: float | None


SINGLE = {"float": "float", "lsq": "7 bit", "sma": "float, SMA", "lsq+sma": "7 bit, SMA"}
FIVE = {"ensemble": "5 × float", "eoq": "5 × 7 bit", "eoa": "5 × float, SMA", "eoq-averages": "5 × 7 bit, SMA"}


def points() -> list[Point]:
    """Return what docs/results/runs says of each method with art paintings unseen: five seeds, or one ensemble."""
    runs = json.loads((RUNS / "study-pacs.json").read_text())["runs"]
    found = []
    for method, label in SINGLE.items():
        own = [run for run in runs if run["method"] == method and run["target"] == "art_painting"]
        accuracies = [100 * run["test_accuracy"] for run in own]
        error = statistics.pstdev(accuracies) / len(own) ** 0.5
        found.append(
            Point(label, statistics.mean(run["size_bytes"] for run in own), statistics.mean(accuracies), error)
        )
    for name, label in FIVE.items():
        result = json.loads((RUNS / f"study-pacs-{name}.json").read_text())
        found.append(Point(label, result["size"]["bytes"], 100 * result["test_accuracy"], None))
    return found


def accuracy_size() -> Figure:
    """Accuracy on art paintings, never trained on, against the bytes of the file."""
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for point in points():
        color = ORANGE if "7 bit" in point.label else BLUE
        marker = "s" if point.error is None else "o"
        axes.errorbar(point.n_bytes / 1e6, point.accuracy, yerr=point.error, fmt=marker, color=color, ms=8, capsize=3)
        # two names would lie on another point's
        place, side = {"5 × 7 bit, SMA": ((-9, -4), "right"), "5 × float, SMA": ((9, -10), "left")}.get(
            point.label, ((9, 6), "left")
        )
        at = (point.n_bytes / 1e6, point.accuracy)
        axes.annotate(point.label, at, place, textcoords="offset points", color=color, ha=side)
    axes.set(xscale="log", xlim=(1.6, 150), xlabel="file size (MB, logarithmic)", ylabel="accuracy on unseen art (%)")
    axes.set_xticks([2, 5, 10, 20, 50, 100], labels=["2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    return figure


NETWORKS = {"lite0": BLUE, "lite1": ORANGE, "lite2": GREEN}


def networks() -> Figure:
    """Accuracy on unseen domains of Office-Caltech against the bytes of the file: small networks, float and rounded."""
    runs = json.loads((RUNS / "small-networks.json").read_text())["runs"]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    places = [{(run["target"], run["seed"]) for run in runs if run["method"] == method} for method in methods]
    common = set.intersection(*places)  # of seeds that some have not, nobody's count
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for network, color in NETWORKS.items():
        found: dict[str, tuple[float, float]] = {}
        for method in methods:
            own = [run for run in runs if run["method"] == method and (run["target"], run["seed"]) in common]
            if method.startswith(network):
                size, right = (float(np.mean([run[key] for run in own])) for key in ("size_bytes", "test_accuracy"))
                found[method.removeprefix(network)] = size / 1e6, 100 * right
        averaged = sorted(at for name, at in found.items() if "sma" in name)
        axes.plot(
            *np.array(averaged).T, "o-", color=color, lw=1, ms=13, label=f"{network.replace('lite', 'Lite')}, SMA"
        )
        for name, at in found.items():
            if "sma" not in name:
                axes.plot(*at, "x", color=color, ms=9)
                continue
            bits = name[5] if name.startswith("-lsq") else "32"
            axes.annotate(bits, at, color="white", fontsize=8, ha="center", va="center_baseline")
    axes.plot([], [], "x", color=plt.rcParams["text.color"], label="last weights, 32 bits")
    axes.legend(frameon=False, loc="lower center")
    axes.set(xscale="log", xlim=(1.4, 25), xlabel="file size (MB, logarithmic)", ylabel="accuracy, unseen (%)")
    axes.set_xticks([2, 5, 10, 20], labels=["2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    return figure


SHIFTS = ("clean", "noise", "blur", "weather", "digital", "jpeg")
SHIFT_METHODS = {
    "float, sma": ("float, SMA", BLUE),
    "lsq, 4 bits": ("4 bit", ORANGE),
    "lsq, 4 bits, sma": ("4 bit, SMA", GREEN),
    "noise-then-round, 7 bits, noise of 3 steps, sma": ("robust, 7 bit", PURPLE),
}


def shift() -> Figure:
    """Differences to float under each family of corruptions, paired by target and seed, with 95 % t intervals."""
    scores = runpy.run_path(str(DOCS.parent / "benchmarks" / "shift_scores.py"))
    runs = list(json.loads((RUNS / "shift-office.json").read_text()).values())
    figure, axes = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
    for place, (method, (label, color)) in enumerate(SHIFT_METHODS.items()):
        found = [scores["differences"](runs, method, "float")[family] for family in SHIFTS]
        at = np.arange(len(SHIFTS)) + 0.2 * (place - 1.5)
        middle = np.array([100 * one.mean for one in found])
        ends = 100 * np.array([[one.mean - one.low, one.high - one.mean] for one in found]).T
        axes.bar(at, middle, 0.18, color=color, alpha=0.75, label=label)
        axes.errorbar(at, middle, yerr=ends, fmt="none", ecolor=plt.rcParams["text.color"], capsize=3, lw=1)
    axes.axhline(0, color=plt.rcParams["text.color"], lw=0.8)
    axes.set(ylabel="accuracy − float (points)", ylim=(-14, 60))
    axes.set_xticks(range(len(SHIFTS)), labels=SHIFTS)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, ncols=4, loc="upper right")
    return figure


GROWTH_LABELS = {
    "parameters": "parameters",
    "domains": "domains",
    "classes": "classes",
    "images": "images",
    "members": "members",
}


def cost_growth() -> Figure:
    """Processor time against the size of the work, a panel per axis, with the fitted exponents."""
    results = json.loads((RUNS / "cost-growth.json").read_text())
    figure, axes = plt.subplots(1, len(results), figsize=(12, 3.0), layout="constrained")
    for panel, (axis, label) in zip(axes, GROWTH_LABELS.items(), strict=True):
        for (name, row), color in zip(results[axis].items(), (BLUE, ORANGE), strict=False):
            sizes, seconds = zip(*row["points"], strict=True)
            text = f"{name}: {row['exponent']:.2f}, last {row['last']:.2f}"
            panel.loglog(sizes, [1000 * one for one in seconds], "o-", color=color, label=text)
        panel.set(xlabel=label)
        low, high = panel.get_ylim()
        panel.set_ylim(low / 1.5, 6 * high)
        panel.legend(frameon=False, fontsize=8, loc="upper left")
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("ms")
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "concepts/minima": minima,
    "concepts/timeline": timeline,
    "concepts/splits": splits,
    "concepts/ensemble": ensemble,
    "results/accuracy-size": accuracy_size,
    "results/networks": networks,
    "results/shift": shift,
    "results/cost-growth": cost_growth,
}


def main() -> None:
    """Write every drawing for both themes."""
    for name, draw in DRAWINGS.items():
        for theme in INK:
            with plt.style.context(style(theme)):
                figure = draw()
                path = DOCS / f"{name}-{theme}.svg"
                path.parent.mkdir(exist_ok=True)
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
                text = path.read_text()
                path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


if __name__ == "__main__":
    main()
