"""`qtdog export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtdog.cli.options import JsonOutput, Model

if TYPE_CHECKING:
    from qtdog.export.export import Exported

FORMAT = "onnx, onnx-int8, openvino, openvino-int8, torch, executorch or c. Default: the float one of OUT's suffix."
DATA = "Data set, folder DOMAIN/CLASS/image or manifest with the source domains. Default: what the run was trained on."
DOMAIN = "Take images of this domain only (several times: of these). Default: every source domain in the data."
BUNDLE = "Write a folder that runs without qtdog: model.onnx (INT8), predict.py, model.json and README.md."
WEB = (
    "Also write index.html, a page that classifies photographs in a browser without a network (with --bundle). DIST is "
    "the folder package/dist of the npm package onnxruntime-web, whose runtime becomes part of the page."
)
CASCADE = "Ask an ensemble's members one after another, until they agree confidently; onnx and openvino formats."
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
    cascade: Annotated[bool, typer.Option("--cascade", help=CASCADE)] = False,
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

      qtdog export runs/five/c-eoq -o five.onnx --format onnx-int8 --data photos/ --cascade
    """
    from qtdog.cli.console import CountingBar, print_json, tidy_end
    from qtdog.cli.train import warn_skipped
    from qtdog.core.errors import ConfigError
    from qtdog.export.bundle import BUNDLE_FORMATS, write_bundle
    from qtdog.export.export import export as write
    from qtdog.export.formats import FORMATS, format_for
    from qtdog.export.images import Draw, draw_export_images
    from qtdog.export.packed_source import read_packed_source
    from qtdog.export.web_page import web_runtime
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
    if cascade and not FORMATS[name].graph:
        raise ConfigError(f"--cascade: a file of the format '{name}' cannot stop early; choose an onnx or openvino one")
    source = read_packed_source(find_model(model), cascade=cascade)
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
    if parity.members is not None:
        means = " → ".join(f"{mean:.2f}" for mean in parity.members)
        rows.append(["members asked, mean", f"{means} of {made.info.n_members}"])
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
