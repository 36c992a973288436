"""`qtdog predict`, `qtdog eval`, `qtdog compare`: what a model says of images or texts, how well, beside another."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtdog.cli.options import AS_JSON, JsonOutput, Model

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

      qtdog predict reviews.safetensors today.txt                   (a model of text: each line is one)
    """
    from qtdog.cli.console import fail
    from qtdog.cli.ensemble import show_cost
    from qtdog.core.errors import QtdogError
    from qtdog.data.scan import PassedOver
    from qtdog.ensemble.model import load
    from qtdog.ensemble.prediction import find_images, find_texts, predict_images, predict_texts
    from qtdog.runs.find import find_model

    model = find_model(model)
    loaded = load(model)
    show_cost(model, loaded)
    if loaded.info.preprocessing.max_tokens:
        found = predict_texts(loaded, find_texts(images))
    else:
        passed = PassedOver()
        found = predict_images(loaded, find_images(images, passed))
        _show_passed_over(passed)
    rows: list[dict[str, Any]] = []
    n_failed = 0
    for row in found:
        if isinstance(row, QtdogError):
            n_failed += 1
            fail(str(row))
        else:
            rows.append(row)
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
    from qtdog.ensemble.prediction import rejected

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


SKIP = "Leave out images that cannot be read, and say how many. Default: as the run did that the model comes from."
CORRUPT = (
    "Score under this corruption instead of clean images: 'all', a family (noise, blur, weather, digital, jpeg) or one "
    "member of it; may be given several times."
)
SEVERITY = "Severity of --corrupt, 1 (mild) to 5 (strong); may be given several times. Default: all five."
DATA = "Data set name, folder DOMAIN/CLASS/image, or list. Default: what the run was trained on."
WORST = 5  # classes that are shown
UNKNOWN = "Folder of images of kinds that it was not trained on, to measure if the uncertainty separates them."


def evaluate(
    model: Model,
    data_argument: Annotated[str | None, typer.Argument(help="The same as --data.", metavar="[DATA]")] = None,
    *,
    data: Annotated[str | None, typer.Option("--data", help=DATA)] = None,
    unknown: Annotated[Path | None, typer.Option(help=UNKNOWN)] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help=SKIP)] = False,
    corrupt: Annotated[list[str] | None, typer.Option(metavar="NAME", help=CORRUPT)] = None,
    severity: Annotated[list[int] | None, typer.Option(min=1, max=5, help=SEVERITY)] = None,
    as_json: JsonOutput = False,
) -> None:
    """Score a model on every domain of a data set (all images; classes are matched by name).

    Beside the accuracy and its 95 % interval (Wilson): expected calibration error and Brier score of the
    probabilities, and the error that is left when the model abstains on the least certain tenth. Below stand the
    classes with the most mistakes, and what their images were taken for; --json has all of them. With --unknown, the
    area under the ROC curve (0.5 is chance, 1 is perfect) of the uncertainty of these images against that of the data
    set.

    Examples:
      qtdog eval runs/photos-c --data photos/

      qtdog eval runs/five/c-eoq --data photos/                   (an ensemble: its cost is shown too)

      qtdog eval model.safetensors --data new-site/ --unknown other-things/ --json

      qtdog eval runs/photos-c --data photos/ --corrupt noise --corrupt jpeg
    """
    from qtdog.cli.console import CountingBar, out, print_json, print_table, warn
    from qtdog.cli.ensemble import ensemble_cost, show_cost
    from qtdog.cli.train import warn_skipped
    from qtdog.core.errors import ConfigError
    from qtdog.data.open import open_readable, recorded_source
    from qtdog.ensemble.model import load
    from qtdog.ensemble.prediction import Uncertainty, find_images
    from qtdog.ensemble.scoring import score_domains, unknown_auroc_of
    from qtdog.report.tables import percent
    from qtdog.runs.find import find_model
    from qtdog.training.load_model import training_configs

    if data is not None and data_argument is not None:
        raise ConfigError(f"two data sets are given: {data_argument} and --data {data}; eval takes one")
    model = find_model(model)
    loaded = load(model)
    skip = skip_unreadable or any(config.data.skip_unreadable for config in training_configs(model))
    configs = training_configs(model)
    source = data or data_argument or (configs[0].data.source if configs else None)
    if source is None:
        raise ConfigError(f"no run lies beside {model}, so its data set is not known: give it with --data")
    with recorded_source(source, is_recorded=not (data or data_argument)):
        dataset = open_readable(source, skip_unreadable=skip, min_domains=1, progress=CountingBar("reading images"))
    warn_skipped(dataset)
    if corrupt or severity:
        _corrupted(loaded, dataset, corrupt or ["all"], severity or [], model=model, as_json=as_json)
        return
    known: list[Uncertainty] = []
    scores = score_domains(loaded, dataset, known, progress=CountingBar("decoding images"))
    average = sum(score["accuracy"] for score in scores.values()) / len(scores)
    auroc, left_out = {}, []
    if unknown is not None:
        auroc, left_out = unknown_auroc_of(loaded, known, find_images([unknown]), skip_unreadable=skip)
    for error in left_out:
        warn(f"left out: {error}")
    if as_json:
        result = {"model": str(model), "data": source, "domains": scores, "average": average} | auroc
        print_json(result | ensemble_cost(model, loaded))
        return
    sources = loaded.info.source_domains
    rows = [_row(domain + (" (trained on)" if domain in sources else ""), score) for domain, score in scores.items()]
    headers = ["domain", "accuracy (%)", "95 % interval", "images", "ECE", "Brier", "error of the surest 90 % (%)"]
    print_table(headers, [*rows, ["average of domains", percent(average), "", "", "", "", ""]])
    show_worst_classes({domain: score["classes"] for domain, score in scores.items()})
    for name, value in auroc.items():
        out.print(f"{name.replace('_', ' ')}: {value:.3f}", highlight=False, soft_wrap=True)
    show_cost(model, loaded)


def _corrupted(
    loaded: Any, dataset: Any, names: Sequence[str], severities: Sequence[int], *, model: Path, as_json: bool
) -> None:
    """Score a model under corruptions and show a row per corruption, each the mean over the severities."""
    from qtdog.cli.console import CountingBar, print_json, print_table
    from qtdog.data.corruptions import SEVERITIES, corruption_names
    from qtdog.ensemble.scoring import score_corruptions
    from qtdog.report.tables import percent

    asked, levels = corruption_names(names), sorted(set(severities)) or SEVERITIES
    rows = score_corruptions(loaded, dataset, asked, levels, progress=CountingBar("scoring under corruptions"))
    if as_json:
        print_json({"model": str(model), "corruptions": rows})
        return
    table = []
    for name in asked:
        cells = [[row["accuracy"] for row in rows if (row["corruption"], row["domain"]) == (name, domain)]
                 for domain in dataset.domains]  # fmt: skip
        means = [sum(values) / len(values) for values in cells]
        table.append([name, *map(percent, [*means, sum(means) / len(means)])])
    title = f"accuracy (%) under corruption, mean over severities {', '.join(map(str, levels))}"
    print_table(["corruption", *dataset.domains, "average"], table, title=title)


def _row(name: str, score: Mapping[str, Any]) -> list[str]:
    from qtdog.report.tables import percent
    from qtdog.runs.statistics import percent_range

    trust = [f"{score['ece']:.3f}", f"{score['brier']:.3f}", percent(score["risk_at_90"])]
    return [name, percent(score["accuracy"]), percent_range(score["interval"]), f"{score['n']:,}", *trust]


def show_worst_classes(classes: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Show the classes that are surely worst, and what their images were taken for.

    The order is by the upper end of the interval: one image that is wrong says little of its class.

    Args:
        classes: by domain, what `training.evaluation.class_scores` gives.
    """
    from qtdog.cli.console import print_table
    from qtdog.report.tables import percent
    from qtdog.runs.statistics import percent_range, share_interval

    found = [
        (share_interval(one["right"] / one["n"], one["n"]), domain, one)
        for domain, rows in classes.items()
        for one in rows
        if one["right"] < one["n"]
    ]
    found.sort(key=lambda each: each[0][1])
    rows = []
    for interval, domain, one in found[:WORST]:
        called = ", ".join(f"{name} ({count})" for name, count in list(one["called"].items())[:3])
        right = f"{one['right']} of {one['n']}"
        rows.append([domain, one["class"], percent(one["right"] / one["n"]), percent_range(interval), right, called])
    if rows:
        headers = ["domain", "class", "accuracy (%)", "95 % interval", "right", "taken for"]
        print_table(headers, rows, title=f"where it errs most: {len(rows)} of {len(found)} classes with mistakes")


SITES = "Images of every site, old and new: a folder SITE/CLASS/image, a name, or a list."
OLD = "The model in use: a file, or the folder that it is in."
NEW = "The model that may replace it: a file, or the folder that it is in."
SKIP_SITES = (
    "Leave out images that cannot be read, and say how many. Default: as the runs did that the models come from."
)
REGRESSED = 1


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help=OLD)],
    new: Annotated[Path, typer.Argument(metavar="NEW", help=NEW)],
    *,
    data: Annotated[str, typer.Option("--data", help=SITES)],
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help=SKIP_SITES)] = False,
    as_json: JsonOutput = False,
) -> None:
    """Compare two models on every site, image by image, before the new one replaces the old one.

    For each site: both accuracies, the images won and lost, the 95 % interval of the difference and the exact McNemar
    test. A site where the new model is worse beyond chance is named, and the exit code is then 1, so that a script can
    stop there. Models may differ in everything but the classes of the data.

    Examples:
      qtdog compare old.safetensors runs/with-site-c --data photos/

      qtdog compare old.safetensors new.safetensors --data photos/ --json
    """
    from dataclasses import asdict

    from qtdog.cli.console import CountingBar, out, print_json, print_table
    from qtdog.cli.train import warn_skipped
    from qtdog.data.open import open_readable
    from qtdog.ensemble.model import load
    from qtdog.ensemble.scoring import compare_sites, worse_sites
    from qtdog.report.tables import percent
    from qtdog.runs.find import find_model
    from qtdog.training.load_model import training_configs

    files = [find_model(path) for path in (old, new)]
    models = [load(file) for file in files]
    skip = skip_unreadable or any(config.data.skip_unreadable for file in files for config in training_configs(file))
    dataset = open_readable(data, skip_unreadable=skip, min_domains=1, progress=CountingBar("reading images"))
    warn_skipped(dataset)
    sites = compare_sites(models[0], models[1], dataset, progress=CountingBar("decoding images"))
    worse = worse_sites(sites)
    if as_json:
        rows = [
            asdict(site) | {"interval": site.interval, "p_value": site.p_value, "verdict": site.verdict}
            for site in sites
        ]
        print_json({"old": str(files[0]), "new": str(files[1]), "data": data, "sites": rows, "worse": worse})
    else:
        sources = set(models[1].info.source_domains)
        table = [
            [
                site.domain + ("" if site.domain in sources else " (unseen)"),
                f"{site.n:,}",
                percent(site.n_old / site.n),
                percent(site.n_new / site.n),
                f"+{site.n_won} −{site.n_lost}",
                "{:+.1f} … {:+.1f}".format(*(100 * end for end in site.interval)),
                site.verdict,
            ]
            for site in sites
        ]
        headers = ["site", "images", "old (%)", "new (%)", "images won, lost", "difference, 95 %", "verdict"]
        unseen = any(site.domain not in sources for site in sites)
        print_table(headers, table, title="(unseen): the new model was not trained on this site" if unseen else None)
        if worse:
            text = f"The new model is worse at {', '.join(worse)}: look at them before it replaces the old one."
            out.print(text, highlight=False, soft_wrap=True)
    if worse:
        raise typer.Exit(REGRESSED)
