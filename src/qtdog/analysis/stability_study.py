"""Accuracy over the steps of several runs, and how far selection on the sources can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from qtdog.analysis.figures import legend, mark_start, panels, plain, save, style
from qtdog.analysis.outcome import Outcome, write_outcome
from qtdog.analysis.points import write_table
from qtdog.analysis.stability import Stability, stability
from qtdog.analysis.subject import about_run, read_run
from qtdog.core.config import Config
from qtdog.core.errors import DataError, RunError
from qtdog.core.random import numpy_stream
from qtdog.runs.record import Record

Run = tuple[str, Config, list[Record]]
CURVES = "curves.csv"


def measure_stability(paths: Sequence[Path], labels: Sequence[str], folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """Read the evaluations of runs, finished or not, draw them, and return what `analysis.json` says.

    Args:
        paths: run folders.
        labels: how each is called.
        folder: where tables and figure go.
        seed: of the resamples.

    Raises:
        RunError: no folder of a run, or one without an evaluation.
        DataError: the runs have different data sets.
    """
    runs: list[Run] = []
    told = []
    for path, label in zip(paths, labels, strict=True):
        run, config = read_run(path)
        records = run.read_metrics()
        if not records:
            raise RunError(f"{path} has no evaluation yet (metrics.jsonl)")
        runs.append((label, config, records))
        told.append(about_run(label, run, config))
    contents = {config.data.content for _, config, _ in runs}
    if len(contents) > 1:
        raise DataError("these runs have different data sets; compare runs on one data set")
    write_table(folder / CURVES, [row for run in runs for row in _curve(*run)])
    numbers = [
        _numbers(label, config, stability(records, numpy_stream(seed, label))) for label, config, records in runs
    ]
    outcome = Outcome(
        kind="stability",
        title="Stability of training, and how far selection on the sources can be trusted",
        settings={"seed": seed},
        runs=told,
        numbers=numbers,
        figures=draw_stability(runs, folder),
        notes=(
            "Over the evaluations that could have been shipped, which for a quantized run are those after its start.",
            "Neighbouring checkpoints are alike: the interval of spearman is too narrow rather than too wide.",
        ),
    )
    return write_outcome(folder, outcome)


def _curve(label: str, config: Config, records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "run": label,
            "step": record.seen.step,
            "selectable": record.seen.selectable,
            "source_accuracy": record.seen.source_accuracy,
            "target_accuracy": record.test_accuracy,
            "start_step": _start(config),
        }
        for record in records
    ]


def _start(config: Config) -> int | None:
    return None if config.quantizer.name == "none" else config.start_step


def _numbers(label: str, config: Config, found: Stability | None) -> dict[str, Any]:
    names = Stability.__dataclass_fields__
    values = dict.fromkeys(names) if found is None else asdict(found)
    return {"run": label, "target": config.data.target} | values


def draw_stability(runs: Sequence[Run], folder: Path) -> list[str]:
    """Draw source and target accuracy over steps, and one against the other; return the names of the files."""
    figure, axes = panels(3)
    for n, (label, _, records) in enumerate(runs):
        steps = [record.seen.step for record in records]
        source = [100 * record.seen.source_accuracy for record in records]
        target = [float("nan") if r.test_accuracy is None else 100 * r.test_accuracy for r in records]
        look = style(n)
        axes[0].plot(steps, source, label=plain(label), markersize=3, **look)
        axes[1].plot(steps, target, markersize=3, **look)
        usable = [i for i, record in enumerate(records) if record.seen.selectable]
        axes[2].plot([source[i] for i in usable], [target[i] for i in usable], linestyle="none", markersize=4, **look)
    for axis in axes[:2]:
        mark_start(axis, [_start(config) for _, config, _ in runs])
        axis.set_xlabel("step")
    _dress(axes)
    legend(figure, axes[0])
    return save(figure, folder, "stability")


def _dress(axes: Sequence[Axes]) -> None:
    axes[0].set_ylabel("accuracy on the sources (%)")
    axes[1].set_ylabel("accuracy on the unseen domain (%)")
    axes[2].set_xlabel("accuracy on the sources (%)")
    axes[2].set_ylabel("accuracy on the unseen domain (%)")
    axes[2].set_title("checkpoints that could be shipped")
    for axis in axes:
        axis.grid(alpha=0.3)
