"""`qtdog export`, and `qtdog bench`: how fast and large the packed and the exported files are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qtdog.cli.options import JsonOutput, Model

if TYPE_CHECKING:
    from qtdog.export.benchmark import Bench, Measured
    from qtdog.export.benchmark_measures import Spread
    from qtdog.export.benchmark_worker import ModelFacts
    from qtdog.export.export import Exported
    from qtdog.export.parity import LabelledImages
    from qtdog.training.load_model import ModelInfo


FORMAT = (
    "onnx, onnx-int8, openvino, openvino-int8, torch, executorch, executorch-int8 or c. Default: the float one of "
    "OUT's suffix."
)
DATA = "Data set, folder DOMAIN/CLASS/image or list with the source domains. Default: what the run was trained on."
DOMAIN = "Take images of this domain only (several times: of these). Default: every source domain in the data."
BUNDLE = "Write a folder that runs without qtdog: model.onnx (INT8), predict.py, model.json and README.md."
WEB = (
    "Also write index.html, a page that classifies photographs in a browser without a network (with --bundle). DIST is "
    "the folder package/dist of the npm package onnxruntime-web, whose runtime becomes part of the page."
)
CALIBRATION = "Number of images that set the ranges of integer activations."
CHECK = "Number of images that the file is compared on."
FORCE = "Accept the domain that was held out in training. What is measured on it afterwards is no longer unseen."


def export(
    model: Model,
    *,
    out: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write; OUT.json goes beside it. A folder with --bundle.")
    ],
    bundle: Annotated[bool, typer.Option("--bundle", help=BUNDLE)] = False,
    web: Annotated[Path | None, typer.Option("--web", metavar="DIST", help=WEB)] = None,
    name: Annotated[str | None, typer.Option("--format", help=FORMAT)] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    domain: Annotated[list[str] | None, typer.Option(help=DOMAIN)] = None,
    calibrate: Annotated[int, typer.Option("--num-calibration", min=1, help=CALIBRATION)] = 256,
    check: Annotated[int, typer.Option("--num-check", min=1, help=CHECK)] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of images.")] = 0,
    force_target: Annotated[bool, typer.Option("--force-target", help=FORCE)] = False,
    as_json: JsonOutput = False,
) -> None:
    """Write a model for another runtime, and check on source images that it answers alike.

    The file takes uint8 images (n, H, W, C) of the model's size and holds preprocessing, class names and what was
    compared. One that does not answer like the packed model is not kept.

    Examples:
      qtdog export runs/photos-c -o model.onnx

      qtdog export runs/photos-c -o model.onnx --format onnx-int8 --data photos/

      qtdog export runs/photos-c -o site/ --bundle                  (then python site/predict.py photo.jpg)

      qtdog export runs/five/c-eoq -o five.xml --format openvino-int8 --data photos/
    """
    from qtdog.cli.console import CountingBar, print_json, tidy_end
    from qtdog.cli.train import warn_skipped
    from qtdog.core.errors import ConfigError
    from qtdog.export.bundle import BUNDLE_FORMATS, web_runtime, write_bundle
    from qtdog.export.export import export as write
    from qtdog.export.formats import FORMATS, format_for
    from qtdog.export.packed_source import read_packed_source
    from qtdog.export.parity import Draw, draw_export_images
    from qtdog.runs.find import find_model
    from qtdog.training.load_model import open_training_data

    if web is not None and not bundle:
        raise ConfigError("--web makes a page of a bundle: add --bundle")
    runtime = None if web is None else web_runtime(web)
    name = (name or BUNDLE_FORMATS[0]) if bundle else format_for(name, out)
    if bundle and not _is_place(out):
        raise ConfigError(f"--output {out}: cannot be written; a bundle is a folder")
    if not bundle and (out.is_dir() or not _is_place(out.parent)):
        hint = ", or --bundle for a folder" if out.is_dir() else ""
        raise ConfigError(f"--output {out}: cannot be written; give the path of a file{hint}")
    source = read_packed_source(find_model(model))
    draw = Draw(check, seed, tuple(domain or ()), force_target)
    dataset = open_training_data([source.path], data, progress=CountingBar("reading images"))
    warn_skipped(dataset)
    n_calibration = calibrate if FORMATS[name].integer else 0
    calibration, images = draw_export_images(dataset, source, draw, n_calibration, CountingBar)
    with tidy_end():
        if bundle:
            made = write_bundle(
                source, out, images, name=name, calibration=calibration, runtime=runtime, watch=CountingBar
            )
        else:
            made = write(source, out, name, images, calibration=calibration, watch=CountingBar)
    if as_json:
        print_json(made.to_json())
    else:
        _show(made)


def _is_place(folder: Path) -> bool:
    """Return whether a folder is there, or can be made."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return nearest.is_dir()


def _show(made: Exported) -> None:
    from qtdog.cli.console import out, print_table, warn
    from qtdog.export.formats import FORMATS
    from qtdog.export.parity import images_of
    from qtdog.report.tables import percent

    parity = made.parity
    size = f"{made.n_bytes / 1e6:.3g} MB ({made.n_bytes / made.packed_bytes:.2f} times the packed file)"
    accuracies = f"{percent(parity.accuracy_packed)} → {percent(parity.accuracy_exported)}"
    logits = f"{parity.max_difference['logits']:.2g} (largest logit {parity.largest_logit:.3g})"
    rows = [
        ["file", size],
        ["compared on", f"{parity.n_images:,} {images_of(parity)}"],
        ["same class (%)", f"{100 * parity.agreement_frac:.2f}"],
        ["largest difference of a logit", logits],
        ["accuracy there (%)", accuracies],
    ]
    if made.info.integer_products is not None:
        n_integer, n_products = made.info.integer_products
        rows.append(["products in integers", f"{n_integer} of {n_products}"])
    print_table(["", FORMATS[made.info.format].title], rows)
    for note in made.info.notes:
        warn(note)
    out.print(f"model  {made.path}", highlight=False, soft_wrap=True, markup=False)
    report = made.path.with_name(f"{made.path.name}.json")
    if report.exists():
        out.print(f"report {report}", highlight=False, soft_wrap=True, markup=False)
    else:
        page = made.path.with_name("index.html")
        if page.exists():
            out.print(f"page   {page}", highlight=False, soft_wrap=True, markup=False)
        out.print(
            f"bundle {made.path.parent}; run python {made.path.with_name('predict.py')} FILES_OR_FOLDERS",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


FILES = "Model files: packed .safetensors, exported .onnx, .xml, .pt2 or .pte; or folders of finished runs."
RUNTIME = (
    "onnxruntime, openvino, torch or executorch; several times: each file in each that opens it. Default: its usual."
)
SIZE = "Image size in pixels (square). Default: what each model was trained with."
MEASURED_DATA = "Measure accuracy too, and latency on real images: of this data set, folder DOMAIN/CLASS/image or list."
MEASURED_DOMAIN = "Domain of DATA to measure on. Default: the one held out in training."
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
    data: Annotated[str | None, typer.Option(help=MEASURED_DATA)] = None,
    domain: Annotated[str | None, typer.Option(help=MEASURED_DOMAIN)] = None,
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
        _show_measured(found)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


def _images(files: list[Path], data: str, domain: str | None, n_images: int) -> Callable[[ModelFacts], LabelledImages]:
    """Return a function that gives an opened model images of one domain, the same ones to every model of one kind."""
    from qtdog.cli.console import CountingBar
    from qtdog.cli.train import warn_skipped
    from qtdog.core.errors import ConfigError
    from qtdog.export.benchmark import model_file
    from qtdog.export.parity import Draw, draw_images
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


def _show_measured(found: Bench) -> None:
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
