"""`qtdog predict`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qtdog.ensemble.model import EnsembleModel
    from qtdog.training.shipped import ShippedModel

BATCH = 64


class Format(StrEnum):
    """How predictions are written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def predict(
    model: Annotated[Path, typer.Argument(help="A .safetensors file of 'qtdog train' or 'ensemble'.", metavar="MODEL")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders that are searched for images.")],
    *,
    style: Annotated[Format, typer.Option("--format", help="How to write the predictions.")] = Format.TABLE,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the screen.")] = None,
) -> None:
    """Write class and probability for each image.

    An unreadable image is named on standard error, the others are still predicted, and the exit code is 1.

    Examples:
      qtdog predict model.safetensors photo.jpg

      qtdog predict model.safetensors new-site/ --format csv --out predictions.csv
    """
    from qtdog.cli.console import fail
    from qtdog.cli.evaluate import say_cost
    from qtdog.core.errors import QtdogError
    from qtdog.ensemble.load import load_any

    shipped = load_any(model)
    say_cost(model, shipped)
    rows: list[dict[str, Any]] = []
    failures = 0
    for row in predictions(shipped, find_images(images)):
        if isinstance(row, QtdogError):
            failures += 1
            fail(str(row))
        else:
            rows.append(row)
    _write(rows, Format.JSON if as_json else style, out)
    if failures:
        fail(f"{failures} of {failures + len(rows)} images could not be read")
        raise typer.Exit(1)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among and below `paths`, in order (DataError if a path is missing or holds none)."""
    from qtdog.core.errors import DataError
    from qtdog.data.files import require_path
    from qtdog.data.folder import images_below

    found: list[Path] = []
    for path in paths:
        require_path(path, "the image or folder")
        inside = images_below(path) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"there is no image in {path} (jpg, png, webp, bmp, tif, gif or ppm)")
        found += inside
    return found


def predictions(shipped: ShippedModel | EnsembleModel, files: Sequence[Path]) -> Iterator[Any]:
    """Yield for each file, in order, a row with `image`, `class` and `probability`, or the error that it gave."""
    import numpy as np
    import torch

    from qtdog.core.errors import QtdogError
    from qtdog.data.decode import decode_resized

    how = shipped.info.preprocessing
    for start in range(0, len(files), BATCH):
        answers: list[Any] = []
        arrays = []
        for file in files[start : start + BATCH]:
            try:
                arrays.append(decode_resized(file, how.image_size, how.channels))
                answers.append({"image": str(file)})
            except QtdogError as error:
                answers.append(error)
        if arrays:
            best = shipped.probabilities(torch.from_numpy(np.stack(arrays))).max(1)
            rows = [answer for answer in answers if isinstance(answer, dict)]
            for row, probability, index in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
                row |= {"class": shipped.info.classes[index], "probability": probability}
        yield from answers


def _write(rows: Sequence[dict[str, Any]], style: Format, out: Path | None) -> None:
    from qtdog.cli.console import print_json, print_table
    from qtdog.core.files import write_atomic

    names = ["image", "class", "probability"]
    if style is Format.TABLE and out is None:
        print_table(names, [[row["image"], row["class"], f"{row['probability']:.3f}"] for row in rows])
    elif style is Format.JSON and out is None:
        print_json(list(rows))
    else:
        text = _text(rows, names, style)
        if out is None:
            typer.echo(text, nl=False)
        else:
            write_atomic(out, text)


def _text(rows: Sequence[dict[str, Any]], names: list[str], style: Format) -> str:
    import json

    from qtdog.report.table import markdown

    if style is Format.JSON:
        return json.dumps(list(rows), indent=1) + "\n"
    if style is Format.TABLE:
        return markdown(names, [[row["image"], row["class"], f"{row['probability']:.3f}"] for row in rows]) + "\n"
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
