"""`qtdog predict`: class, probability and uncertainty of images or texts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import AS_JSON, Model

if TYPE_CHECKING:
    from qtdog.data.scan import PassedOver


class Format(StrEnum):
    """How predictions are written."""

    TEXT = "text"
    TABLE = "table"  # its name before
    CSV = "csv"
    JSON = "json"


FORMAT = "How the predictions are written. Default: by the ending of -o, else text."
SUFFIXES = {".csv": Format.CSV, ".json": Format.JSON}
THRESHOLD = (
    "Say which answers to accept: those whose probability reaches P, or 'auto' for the threshold in the model's file, "
    "which was chosen on validation images of the sources."
)


def predict(
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(help="Images, or folders of images. For text: .txt files, a text per line.")
    ],
    *,
    style: Annotated[Format | None, typer.Option("--format", metavar="text|csv|json", help=FORMAT)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=AS_JSON)] = False,
    reject: Annotated[
        float, typer.Option(min=0, max=0.99, help="Abstain on this share of the images, the least certain ones.")
    ] = 0.0,
    threshold: Annotated[str | None, typer.Option(metavar="auto|P", help=THRESHOLD)] = None,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Run an ensemble's members only until the first ones agree confidently.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of printing.")] = None,
) -> None:
    """Write class, probability and uncertainty of each image.

    The uncertainty is the entropy of the class probabilities in nats (0 is certain). An ensemble also gives the
    disagreement of its members (mutual_information, nats) and the share of them that choose the same class (agreement).
    An unreadable image is named on standard error, the others are still predicted, and the exit code is 1.

    Examples:
      qtdog predict runs/photos-c photo.jpg

      qtdog predict model.safetensors new-site/ -o predictions.csv

      qtdog predict ensemble.safetensors new-site/ --reject 0.1     (no class for the least certain tenth)

      qtdog predict model.safetensors new-site/ --threshold auto    (which answers to accept)

      qtdog predict ensemble.safetensors new-site/ --cascade        (fewer forward passes)

      qtdog predict reviews.safetensors today.txt                   (a model of text: each line is one)
    """
    from qtdog.cli.console import fail
    from qtdog.cli.ensemble import show_cost
    from qtdog.core.errors import QtdogError
    from qtdog.data.scan import PassedOver
    from qtdog.ensemble.model import load
    from qtdog.ensemble.prediction import as_cascade, find_images, find_texts, predict_images, predict_texts
    from qtdog.runs.find import find_model

    model = find_model(model)
    loaded = load(model)
    show_cost(model, loaded)
    predictor: Any = as_cascade(loaded) if cascade else loaded
    if loaded.info.preprocessing.max_tokens:
        found = predict_texts(predictor, find_texts(images))
    else:
        passed = PassedOver()
        found = predict_images(predictor, find_images(images, passed))
        _show_passed_over(passed)
    rows: list[dict[str, Any]] = []
    n_failed = 0
    for row in found:
        if isinstance(row, QtdogError):
            n_failed += 1
            fail(str(row))
        else:
            rows.append(row)
    if cascade:
        _show_members_asked(rows, len(predictor.model.members))
    if threshold is not None:
        accept_(rows, accepted_from(loaded, model, threshold))
    abstain_(rows, reject)
    kind = Format.JSON if as_json else style or SUFFIXES.get(out.suffix if out else "", Format.TEXT)
    _write(rows, kind, out)
    if n_failed:
        fail(f"{n_failed} of {n_failed + len(rows)} images could not be read")
        raise typer.Exit(1)


def _show_passed_over(passed: PassedOver) -> None:
    from qtdog.cli.console import err, warn

    if passed.summary():
        err.print(passed.summary(), markup=False, highlight=False, soft_wrap=True)
    for problem in passed.problems():
        warn(problem)


def _show_members_asked(rows: Sequence[dict[str, Any]], n_members: int) -> None:
    """Print to standard error how many members were run on average."""
    from qtdog.cli.console import err

    if rows:
        mean = sum(row["members"] for row in rows) / len(rows)
        err.print(f"cascade: {mean:.2f} of {n_members} members asked on average", highlight=False, soft_wrap=True)


def accepted_from(loaded: Any, model: Path, threshold: str) -> float:
    """Return the smallest probability of an accepted answer: a number, or that of the model's file ("auto").

    Raises:
        ConfigError: neither, or the file has none.
    """
    from qtdog.core.errors import ConfigError

    if threshold != "auto":
        with contextlib.suppress(ValueError):
            if 0 <= float(threshold) <= 1:
                return float(threshold)
        raise ConfigError(f"--threshold is 'auto' or a probability from 0 to 1, not '{threshold}'")
    found = loaded.info.accept_threshold
    if found is None:
        text = f"{model} holds no threshold: it is from before they were kept, or was trained on its validation images"
        raise ConfigError(f"{text}. Give one, like --threshold 0.9")
    return found


def accept_(rows: Sequence[dict[str, Any]], threshold: float) -> None:
    """Mark in place which rows have a probability that reaches a threshold, and say how many do."""
    from qtdog.cli.console import err

    for row in rows:
        row["accepted"] = row["probability"] >= threshold
    n_accepted = sum(row["accepted"] for row in rows)
    err.print(f"accepted {n_accepted} of {len(rows)} (probability ≥ {threshold:.4f})", highlight=False, soft_wrap=True)


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
    from qtdog.cli.console import print_json, print_table, print_text
    from qtdog.core.errors import RunError
    from qtdog.core.files import write_atomic

    names = list(rows[0]) if rows else ["image", "class", "probability"]
    if style in (Format.TEXT, Format.TABLE) and out is None:
        print_table(names, _cells(rows))
    elif style is Format.JSON and out is None:
        print_json(list(rows))
    else:
        text = _text(rows, names, style)
        if out is None:
            print_text(text)
        else:
            try:
                write_atomic(out, text)
            except RunError:  # hours of work may be in it
                print_text(text)
                raise


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]


def _text(rows: Sequence[dict[str, Any]], names: list[str], style: Format) -> str:
    import json

    from qtdog.core.safe_text import csv_line
    from qtdog.report.render import markdown

    if style is Format.JSON:
        return json.dumps(list(rows), indent=1) + "\n"
    if style in (Format.TEXT, Format.TABLE):
        return markdown(names, _cells(rows)) + "\n"
    return "".join(map(csv_line, [names, *(row.values() for row in rows)]))
