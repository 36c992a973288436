"""`qtdog bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qtdog.cli.options import JsonOutput

if TYPE_CHECKING:
    from qtdog.export.benchmark import Bench, Measured
    from qtdog.export.benchmark_statistics import Spread
    from qtdog.export.benchmark_worker import ModelFacts
    from qtdog.export.images import LabelledImages
    from qtdog.training.load_model import ModelInfo

FILES = "Model files: packed .safetensors, exported .onnx, .xml, .pt2 or .pte; or folders of finished runs."
RUNTIME = (
    "onnxruntime, openvino, torch or executorch; several times: each file in each that opens it. Default: its usual."
)
SIZE = "Image size in pixels (square). Default: what each model was trained with."
DATA = "Measure accuracy too, and latency on real images: of this data set, folder DOMAIN/CLASS/image or manifest."
DOMAIN = "Domain of DATA to measure on. Default: the one held out in training."
OUT = "Folder to write: bench.json and bench.png (latency against accuracy, or size)."
IMAGES = "Largest number of images to measure accuracy on."
INTERRUPTED = 130


def bench(
    files: Annotated[list[Path], typer.Argument(help=FILES, metavar="FILE...")],
    *,
    runtime: Annotated[list[str] | None, typer.Option(help=RUNTIME)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each model. Default: all cores.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of images in one call.")] = 1,
    image_size: Annotated[int | None, typer.Option(min=8, max=1024, help=SIZE)] = None,
    rounds: Annotated[int, typer.Option("--num-rounds", min=1, help="Number of turns of every model.")] = 15,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    domain: Annotated[str | None, typer.Option(help=DOMAIN)] = None,
    images: Annotated[int, typer.Option("--num-images", min=1, help=IMAGES)] = 1024,
    out: Annotated[Path | None, typer.Option("--output", "-o", help=OUT)] = None,
    as_json: JsonOutput = False,
) -> None:
    """Measure latency, throughput, memory and size of models beside one another; ratios are to the first one.

    Each model has a process of its own and they run in turns, so that a busy machine slows all alike. Ctrl-C ends the
    measurement and shows the rounds that are complete.

    Examples:
      qtdog bench runs/photos-c model-int8.onnx

      qtdog bench model.onnx model-int8.onnx --runtime onnxruntime --runtime openvino --threads 2

      qtdog bench runs/float five-int8.onnx --data photos/ -o comparison/
    """
    from qtdog.cli.console import CountingBar, print_json
    from qtdog.core.errors import ConfigError
    from qtdog.export.benchmark import BenchmarkPlan
    from qtdog.export.benchmark import bench as measure

    if domain is not None and data is None:
        raise ConfigError("--domain says where to measure accuracy: give --data too")
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--output {out}: a file; give a folder")
    plan = BenchmarkPlan(threads, batch, image_size, rounds, tuple(runtime or ()))
    source = None if data is None else _images(files, data, domain, images)
    found = measure(files, plan, images=source, progress=CountingBar("measuring"))
    if out is not None:
        _keep(found, out)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def _images(files: list[Path], data: str, domain: str | None, n_images: int) -> Callable[[ModelFacts], LabelledImages]:
    """Return a function that gives an opened model images of one domain, the same ones to every model of one kind."""
    from qtdog.cli.console import CountingBar
    from qtdog.cli.train import warn_skipped
    from qtdog.core.errors import ConfigError
    from qtdog.export.benchmark import model_file
    from qtdog.export.images import Draw, draw_images
    from qtdog.training.load_model import open_training_data

    dataset = open_training_data([model_file(file) for file in files], data, progress=CountingBar("reading images"))
    warn_skipped(dataset)
    made: dict[tuple[object, ...], LabelledImages] = {}

    def draw(opened: ModelFacts) -> LabelledImages:
        where = domain or opened.info.target_domain
        if where is None:
            raise ConfigError("a model was trained on every domain, so say on which to measure accuracy: --domain")
        preprocessing = opened.info.preprocessing.model_copy(update={"image_size": opened.image_size})
        key = (where, preprocessing, opened.info.classes)
        if key not in made:
            # what an export says of itself has every field that is read there
            info = cast("ModelInfo", opened.info.model_copy(update={"preprocessing": preprocessing}))
            asked = Draw(n_images, 0, (where,), force_target=True)  # it is measured here, and nothing chosen by it
            made[key] = draw_images(dataset, info, asked, CountingBar("reading images"))
        return made[key]

    return draw


def _keep(found: Bench, folder: Path) -> None:
    import json

    from qtdog.core.files import write_atomic
    from qtdog.export.benchmark import plot_bench

    write_atomic(folder / "bench.json", json.dumps(found.to_json(), indent=1))
    plot_bench(found, folder / "bench.png")


def _show(found: Bench) -> None:
    from qtdog.cli.console import out, print_table, warn

    size = " / ".join(sorted({f"{row.image_size} px" for row in found.rows}))
    n_rounds = found.rows[0].timing.n_rounds
    setting = f"batch {found.batch}, {size}, {found.threads} thread(s), {n_rounds} rounds in turns"
    headers = ["model", "runtime", "÷ first (quartiles)", "p50 ms", "p95 ms", "images/s"]
    print_table(headers, [_time_row(row) for row in found.rows], title=setting)
    headers = ["model", "processor ÷ first", "memory", "file", "operators"]
    rows = [_cost_row(row) for row in found.rows]
    if any(row.accuracy is not None for row in found.rows):
        from qtdog.report.tables import percent

        headers.append("accuracy (%)")
        rows = [[*row, percent(of.accuracy)] for row, of in zip(rows, found.rows, strict=True)]
    if any(row.members is not None for row in found.rows):
        headers.append("members asked")
        asked = [str(row.n_members) if row.members is None else f"{row.members:.2f}" for row in found.rows]
        rows = [[*row, value] for row, value in zip(rows, asked, strict=True)]
    print_table(headers, rows)
    features = ", ".join(found.machine["cpu_features"]) or "not known"
    out.print(f"{found.machine['cpu']}: {features}", highlight=False, markup=False, soft_wrap=True)
    if found.interrupted:
        warn(f"interrupted: the {n_rounds} whole rounds are shown")


def _time_row(row: Measured) -> list[str]:
    timing = row.timing
    rate = f"{timing.images_per_s:,.0f}" if timing.images_per_s >= 10 else f"{timing.images_per_s:.2f}"
    times = [f"{1e3 * seconds:.1f}" for seconds in (timing.p50_s, timing.p95_s)]
    return [row.label, row.runtime, _spread(timing.ratio), *times, rate]


def _cost_row(row: Measured) -> list[str]:
    memory, size = f"{row.model_bytes / 1e6:.0f} MB", f"{row.file_bytes / 1e6:.3g} MB"
    return [row.label, _spread(row.timing.cpu_ratio), memory, size, _operators(row)]


def _spread(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _operators(row: Measured) -> str:
    """Return how many operators the file has, and how many the runtime made of them by fusing."""
    if row.operators is None or not row.operators["in_file"]:
        return "–"
    n_file = sum(row.operators["in_file"].values())
    fused = row.operators["in_runtime"]
    return f"{n_file}" if fused is None else f"{n_file} → {sum(fused.values())}"
