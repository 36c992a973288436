"""Latency, memory and size of model files beside one another, taken in turns so that a busy machine harms all alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from qtdog.core.errors import ConfigError, FormatError
from qtdog.core.machine import n_cores
from qtdog.core.printable import legend_columns
from qtdog.export.benchmark_measures import Timing, Turn, cpu_features, pareto, timing_of
from qtdog.export.benchmark_worker import WORKER, BenchmarkJob, ModelFacts, Worker
from qtdog.export.parity import LabelledImages
from qtdog.export.runtimes import RUNTIMES, runtimes_for
from qtdog.training.finalize import environment


@dataclass(frozen=True)
class Measured:
    """What one model file is and costs in one runtime.

    Attributes:
        path: as given.
        runtime: in which it ran.
        format: of the export, or "packed".
        n_members: networks inside.
        image_size: pixels it was given.
        timing: see there; its ratio is to the first file.
        open_s: seconds to open it.
        file_bytes: on disk, with the weights beside it where there are such.
        peak_bytes: largest resident memory of its process.
        model_bytes: how much of that came after the libraries were loaded.
        operators: `bench_operators.Operators` as a dictionary, or None.
        accuracy: on the images that were given, or None.
    """

    path: str
    runtime: str
    format: str
    n_members: int
    image_size: int
    timing: Timing
    open_s: float
    file_bytes: int
    peak_bytes: int
    model_bytes: int
    operators: dict[str, Any] | None
    accuracy: float | None

    @property
    def label(self) -> str:
        """A short name: of the file, or of the run's folder."""
        path = Path(self.path)
        return path.parent.name if path.name == "model.safetensors" else path.name


@dataclass(frozen=True)
class Bench:
    """A comparison.

    Attributes:
        rows: in the order of the files; ratios are to the first.
        threads: that each could use.
        batch: images per call.
        interrupted: whether it was broken off before the last round.
        machine: `training.finalize.environment`, and `cpu_features`.
    """

    rows: tuple[Measured, ...]
    threads: int
    batch: int
    interrupted: bool
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return everything as a dictionary that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class BenchmarkPlan:
    """How to measure.

    Attributes:
        threads: that each model may use; None for all cores.
        batch: images per call.
        image_size: pixels, or None for each model's own.
        n_rounds: turns of every model.
        runtimes: names; a file is measured in each of these that can open it; none for the usual one of each file.
    """

    threads: int | None = None
    batch: int = 1
    image_size: int | None = None
    n_rounds: int = 15
    runtimes: tuple[str, ...] = ()


def bench(
    files: Sequence[Path],
    plan: BenchmarkPlan,
    *,
    images: Callable[[ModelFacts], LabelledImages] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    command: Sequence[str] = WORKER,
) -> Bench:
    """Measure model files in turns and return what each costs.

    Each runs in a process of its own, which waits while another has its turn. The order turns with every round. An
    interrupt (Ctrl-C) after the first round ends the measurement; what was measured is returned.

    Args:
        files: packed, exported, or folders with a `model.safetensors`.
        plan: how.
        images: gives labelled images for an opened model: its accuracy on them is measured too, and its latency.
            Without, latency is that of random pixels.
        progress: called with (done, total) rounds.
        command: starts the process of one model.

    Raises:
        ConfigError: a runtime is unknown or can open none of the files, or a model cannot take such images.
        FormatError: a file is missing, damaged, or not made by qtdog.
        ModelError: a runtime is not installed.
        RunError: the process of a model died; the text names the signal or exit code and ends with its last lines.
    """
    threads = plan.threads or n_cores()
    jobs = [
        BenchmarkJob(path, name, threads, plan.batch, plan.image_size)
        for path in (model_file(path) for path in files)
        for name in choose_runtimes(path, plan.runtimes)
    ]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(job, command)) for job in jobs]
        accuracies = [None if images is None else _accuracy(worker, images(worker.opened)) for worker in workers]
        rounds, interrupted = _rounds(workers, plan.n_rounds, progress)
    rows = tuple(
        _measured(worker, timing_of(turns, rounds[0], plan.batch), accuracy)
        for worker, turns, accuracy in zip(workers, rounds, accuracies, strict=True)
    )
    return Bench(rows, threads, plan.batch, interrupted, environment() | {"cpu_features": cpu_features()})


def model_file(path: Path) -> Path:
    """Return the model file that a path means: itself, or what lies in a run's folder.

    Raises:
        FormatError: the path, or the file in the folder, does not exist.
    """
    found = path / "model.safetensors" if path.is_dir() else path
    if not found.is_file():
        raise FormatError(f"{found} does not exist; give model files, or folders of finished runs")
    return found


def choose_runtimes(path: Path, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the runtimes in which to measure a file: those wanted that can open it, else its usual one.

    Raises:
        ConfigError: a runtime is unknown.
        FormatError: no kind of file that can be opened.

    Example:
        >>> choose_runtimes(Path("a.onnx"), ["openvino", "torch"]), choose_runtimes(Path("a.safetensors"), ["openvino"])
        (('openvino',), ('torch',))
    """
    for name in wanted:
        if name not in RUNTIMES:
            raise ConfigError(f"no runtime is called '{name}'; there are {', '.join(RUNTIMES)}")
    able = runtimes_for(path)
    return tuple(name for name in wanted if name in able) or able[:1]


def file_bytes(path: Path) -> int:
    """Return the bytes of a model file; those of an OpenVINO .xml with its .bin."""
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    return sum(part.stat().st_size for part in [path, *beside] if part.is_file())


def _rounds(
    workers: Sequence[Worker], n_rounds: int, progress: Callable[[int, int], None]
) -> tuple[list[list[Turn]], bool]:
    """Return for each worker its turn of each round, and whether an interrupt ended it early."""
    done: list[list[Turn]] = [[] for _ in workers]
    try:
        for index in range(n_rounds):
            order = [(place + index) % len(workers) for place in range(len(workers))]
            turns = {place: workers[place].ask("time") for place in order}
            for place, turn in turns.items():
                done[place].append(turn)
            progress(index + 1, n_rounds)
    except KeyboardInterrupt:
        n_whole = min(map(len, done))
        if not n_whole:
            raise
        return [turns[:n_whole] for turns in done], True
    return done, False


def _accuracy(worker: Worker, images: LabelledImages) -> float:
    return float((worker.ask(images.pixels).argmax(1) == images.labels).mean())


def _measured(worker: Worker, timing: Timing, accuracy: float | None) -> Measured:
    opened = worker.opened
    return Measured(
        path=str(worker.job.path),
        runtime=worker.job.runtime,
        format=opened.info.format,
        n_members=opened.info.n_members,
        image_size=opened.image_size,
        timing=timing,
        open_s=opened.open_s,
        file_bytes=file_bytes(worker.job.path),
        peak_bytes=opened.peak_bytes,
        model_bytes=opened.model_bytes,
        operators=None if opened.operators is None else asdict(opened.operators),
        accuracy=accuracy,
    )


mpl.use("Agg")


def plot_bench(bench: Bench, path: Path) -> None:
    """Draw the models of a comparison to `path`; a line joins those that no other beats in both respects.

    Across: median latency, with the spread between it and the 95th percentile. Up: accuracy if every model has one,
    else size of the file.

    Args:
        bench: what was measured.
        path: a .png.
    """
    rows = bench.rows
    with_accuracy = all(row.accuracy is not None for row in rows)
    latencies = [1e3 * row.timing.p50_s for row in rows]
    tails = [1e3 * max(row.timing.p95_s - row.timing.p50_s, 0) for row in rows]
    heights = [100 * row.accuracy if row.accuracy is not None else row.file_bytes / 1e6 for row in rows]
    if not with_accuracy:
        heights = [row.file_bytes / 1e6 for row in rows]
    best = pareto(latencies, [-height if with_accuracy else height for height in heights])
    figure, axis = plt.subplots(figsize=(7, 4.8))
    for row, x, y, tail in zip(rows, latencies, heights, tails, strict=True):
        axis.errorbar(x, y, xerr=[[0], [tail]], fmt="o", capsize=3, label=f"{row.label}, {row.runtime}")
    axis.plot([latencies[k] for k in best], [heights[k] for k in best], color="tab:grey", linestyle="--", zorder=0)
    axis.set_xlabel(f"latency of {bench.batch} image(s), {bench.threads} thread(s): median, and up to p95 (ms)")
    axis.set_ylabel("accuracy (%)" if with_accuracy else "file (MB)")
    axis.set_xlim(left=0)
    axis.margins(x=0.1, y=0.15)
    axis.grid(alpha=0.3)
    ncols = legend_columns([f"{row.label}, {row.runtime}" for row in rows], figure.get_figwidth())
    figure.legend(loc="lower center", ncols=ncols, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.05 + 0.05 * -(-len(rows) // ncols), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
