"""`qtdog predict`, for images and for texts, with one model, an ensemble or a cascade."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from qtdog.ensemble.cascade import CascadeModel
    from qtdog.ensemble.model import EnsembleModel
    from qtdog.training.load import LoadedModel


def cascading(shipped: LoadedModel | EnsembleModel) -> CascadeModel:
    """Return an ensemble as a cascade.

    Raises:
        ConfigError: it is one model, or its file has no threshold.
    """
    from qtdog.core.errors import ConfigError
    from qtdog.ensemble.cascade import CascadeModel
    from qtdog.ensemble.model import EnsembleModel

    if not isinstance(shipped, EnsembleModel):
        raise ConfigError("--cascade is for an ensemble; this file holds one model")
    return CascadeModel(shipped)


def cascade_rows(model: CascadeModel, inputs: Tensor) -> list[dict[str, Any]]:
    """Return what a cascade says of each input, in order, with the number of `members` that were asked."""
    rows: dict[int, dict[str, Any]] = {}
    for group in model.ask(inputs):
        n_asked = len(group.logits)
        for place, row in zip(group.places.tolist(), logit_rows(model.model, group.logits), strict=True):
            doubt = {"mutual_information": 0.0, "agreement": 1.0}
            rows[place] = row | {name: row.get(name, value) for name, value in doubt.items()} | {"members": n_asked}
    return [rows[place] for place in sorted(rows)]


def say_members(rows: Sequence[dict[str, Any]], n_members: int) -> None:
    """Print how many members were asked on average to standard error; nothing without an answer."""
    from qtdog.cli.console import err

    if rows:
        mean = sum(row["members"] for row in rows) / len(rows)
        text = f"cascade: {mean:.2f} of {n_members} members asked on average"
        err.print(text, highlight=False, soft_wrap=True)


def text_predictions(shipped: LoadedModel | EnsembleModel, paths: Sequence[Path]) -> Iterator[Any]:
    """Yield a row (`text`, `class`, `probability`, …) for each line of the .txt files among and below `paths`.

    A file that cannot be read gives its error instead.

    Raises:
        DataError: a path is missing, or is a folder without such a file.
        ModelError: the file holds no vocabulary, and it cannot be had from elsewhere.
    """
    import torch

    from qtdog.core.errors import DataError
    from qtdog.models.text import make_tokenizer

    how = shipped.info.preprocessing
    tokenise = make_tokenizer(shipped.info.backbone, how.max_tokens, how.vocabulary)
    for file in find_texts(paths):
        try:
            lines = read_lines(file)
        except DataError as error:
            yield error
            continue
        for start in range(0, len(lines), BATCH):
            part = lines[start : start + BATCH]
            tokens = torch.from_numpy(tokenise([text for _, text in part])).long()
            for (number, _), told in zip(part, answer_columns(shipped, tokens), strict=True):
                yield {"text": f"{file}:{number}"} | told


def find_texts(paths: Sequence[Path]) -> list[Path]:
    """Return the .txt files among and below `paths`, in order (DataError if a path is missing or holds none)."""
    from qtdog.core.errors import DataError
    from qtdog.data.image_folder import require_path

    found: list[Path] = []
    for path in paths:
        require_path(path, "the text file or folder")
        inside = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"there is no .txt file in {path}; each line of one is a text")
        found += inside
    return found


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Return number (from 1) and text of each line that is not empty (DataError if the file is no UTF-8 text)."""
    from qtdog.core.errors import DataError

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


BATCH = 64


class Format(StrEnum):
    """How predictions are written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def predict(
    model: Annotated[Path, typer.Argument(help="A .safetensors file of 'qtdog train' or 'ensemble'.", metavar="MODEL")],
    images: Annotated[
        list[Path], typer.Argument(help="Images, or folders of images. For text: .txt files, a text per line.")
    ],
    *,
    style: Annotated[Format, typer.Option("--format", help="How to write the predictions.")] = Format.TABLE,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    reject: Annotated[
        float, typer.Option(min=0, max=0.99, help="Abstain on this share of the images, the least certain ones.")
    ] = 0.0,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Ask an ensemble's members only until the first ones agree confidently.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the screen.")] = None,
) -> None:
    """Write class, probability and doubt for each image.

    Doubt is the entropy of the class probabilities in nats (0 is sure). An ensemble also says how far its members
    disagree (mutual_information, nats) and how many of them share its choice (agreement). An unreadable image is named
    on standard error, the others are still predicted, and the exit code is 1.

    Examples:
      qtdog predict model.safetensors photo.jpg

      qtdog predict model.safetensors new-site/ --format csv --out predictions.csv

      qtdog predict ensemble.safetensors new-site/ --reject 0.1     (no class for the least certain tenth)

      qtdog predict ensemble.safetensors new-site/ --cascade        (fewer forward passes)

      qtdog predict reviews.safetensors today.txt                   (a model of text: each line is one)
    """
    from qtdog.cli.console import fail
    from qtdog.cli.evaluate import say_cost
    from qtdog.core.errors import QtdogError
    from qtdog.ensemble.model import load

    shipped = load(model)
    say_cost(model, shipped)
    asked: Any = cascading(shipped) if cascade else shipped
    rows: list[dict[str, Any]] = []
    failures = 0
    told = text_predictions if shipped.info.preprocessing.max_tokens else image_predictions
    for row in told(asked, images):
        if isinstance(row, QtdogError):
            failures += 1
            fail(str(row))
        else:
            rows.append(row)
    if cascade:
        say_members(rows, len(asked.model.members))
    abstain_(rows, reject)
    _write(rows, Format.JSON if as_json else style, out)
    if failures:
        fail(f"{failures} of {failures + len(rows)} images could not be read")
        raise typer.Exit(1)


def image_predictions(shipped: LoadedModel | EnsembleModel | CascadeModel, paths: Sequence[Path]) -> Iterator[Any]:
    """Yield `predictions` of the images among and below `paths`."""
    yield from predictions(shipped, find_images(paths))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the image files among and below `paths`, in order (DataError if a path is missing or holds none)."""
    from qtdog.core.errors import DataError
    from qtdog.data.image_folder import images_below, require_path

    found: list[Path] = []
    for path in paths:
        require_path(path, "the image or folder")
        inside = images_below(path) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"there is no image in {path} (jpg, png, webp, bmp, tif, gif or ppm)")
        found += inside
    return found


def predictions(shipped: LoadedModel | EnsembleModel | CascadeModel, files: Sequence[Path]) -> Iterator[Any]:
    """Yield for each file, in order, a row (`image`, `class`, `probability`, `entropy`, …), or the error it gave."""
    import numpy as np
    import torch

    from qtdog.core.errors import QtdogError
    from qtdog.data.decode import decode_resized

    how = shipped.info.preprocessing
    for start in range(0, len(files), BATCH):
        rows: list[Any] = []
        arrays = []
        for file in files[start : start + BATCH]:
            try:
                arrays.append(decode_resized(file, how.image_size, how.channels))
                rows.append({"image": str(file)})
            except QtdogError as error:
                rows.append(error)
        if arrays:
            told = answer_columns(shipped, torch.from_numpy(np.stack(arrays)))
            for row, values in zip((row for row in rows if isinstance(row, dict)), told, strict=True):
                row |= values
        yield from rows


def answer_columns(shipped: LoadedModel | EnsembleModel | CascadeModel, images: Tensor) -> list[dict[str, Any]]:
    """Return for each image, uint8 (n, H, W, C), or row of tokens, int64 (n, length), what the model says of it."""
    from qtdog.ensemble.cascade import CascadeModel
    from qtdog.ensemble.evaluation import member_logits

    device = next(shipped.parameters()).device
    inputs = shipped.prepare(images).to(device)
    if isinstance(shipped, CascadeModel):
        return cascade_rows(shipped, inputs)
    return logit_rows(shipped, member_logits(shipped, inputs))


def logit_rows(shipped: LoadedModel | EnsembleModel, logits: Tensor) -> list[dict[str, Any]]:
    """Return what a model says of each image whose logits (members, n, n_classes) are given."""
    from qtdog.ensemble.evaluation import answers, temperature_of

    found = answers(logits, temperature_of(shipped))
    best = found.probabilities.max(1)
    columns = {
        "class": [shipped.info.classes[index] for index in best.indices.tolist()],
        "probability": best.values.tolist(),
        "entropy": found.doubt.entropy.tolist(),
    }
    if len(logits) > 1:
        columns["mutual_information"] = found.doubt.mutual_information.tolist()
        columns["agreement"] = found.doubt.agreement.tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def abstain_(rows: Sequence[dict[str, Any]], frac: float) -> None:
    """Take the class from the least certain share of the rows, in place, and mark which; 0 leaves them as they are."""
    from qtdog.cli.console import err
    from qtdog.ensemble.uncertainty import rejected

    if not frac:
        return
    mask = rejected([row["entropy"] for row in rows], frac)
    for row, is_rejected in zip(rows, mask.tolist(), strict=True):
        row["rejected"] = is_rejected
        if is_rejected:
            row["class"] = ""
    err.print(f"abstained on {mask.sum()} of {len(rows)} images", highlight=False, soft_wrap=True)


def _write(rows: Sequence[dict[str, Any]], style: Format, out: Path | None) -> None:
    from qtdog.cli.console import print_json, print_table
    from qtdog.core.files import write_atomic

    names = list(rows[0]) if rows else ["image", "class", "probability"]
    if style is Format.TABLE and out is None:
        print_table(names, _cells(rows))
    elif style is Format.JSON and out is None:
        print_json(list(rows))
    else:
        text = _text(rows, names, style)
        if out is None:
            typer.echo(text, nl=False)
        else:
            write_atomic(out, text)


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]


def _text(rows: Sequence[dict[str, Any]], names: list[str], style: Format) -> str:
    import json

    from qtdog.report.tables import markdown

    if style is Format.JSON:
        return json.dumps(list(rows), indent=1) + "\n"
    if style is Format.TABLE:
        return markdown(names, _cells(rows)) + "\n"
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
