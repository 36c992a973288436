"""`qtdog eval`: accuracy and reliability of a model on every domain of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

SKIP = "Leave out images that cannot be read, and say how many. Default: as the run did that the model comes from."
CASCADE = "Show also what an ensemble reaches if its members are run only until the first ones agree confidently."


def evaluate(
    model: Annotated[Path, typer.Argument(help="A .safetensors file of 'qtdog train' or 'ensemble'.", metavar="MODEL")],
    data: Annotated[str, typer.Argument(help="Data set name, folder DOMAIN/CLASS/image, or manifest.", metavar="DATA")],
    *,
    unknown: Annotated[
        Path | None, typer.Option(help="Folder of images of unknown kinds: does the uncertainty separate them?")
    ] = None,
    skip_unreadable: Annotated[bool, typer.Option("--skip-unreadable", help=SKIP)] = False,
    cascade: Annotated[bool, typer.Option("--cascade", help=CASCADE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on every domain of a data set (all images; classes are matched by name).

    Beside the accuracy: expected calibration error and Brier score of the probabilities, and the error that is left
    when the model abstains on the least certain tenth. With --unknown, the area under the ROC curve (0.5 is chance, 1
    is perfect) of the uncertainty of these images against that of the data set.

    Examples:
      qtdog eval runs/photos-c/model.safetensors photos/

      qtdog eval runs/five/c-eoq/model.safetensors photos/        (an ensemble: its cost is shown too)

      qtdog eval runs/five/c-eoq/model.safetensors photos/ --cascade

      qtdog eval model.safetensors new-site/ --unknown other-things/ --json
    """
    from qtdog.cli.console import CountingBar, out, print_json, print_table
    from qtdog.cli.ensemble import ensemble_cost, show_cost
    from qtdog.cli.train import warn_skipped
    from qtdog.data.open import open_readable
    from qtdog.ensemble.evaluation import score_domains, unknown_auroc_of
    from qtdog.ensemble.model import load
    from qtdog.ensemble.prediction import as_cascade, find_images
    from qtdog.ensemble.uncertainty import Uncertainty
    from qtdog.report.tables import percent
    from qtdog.training.load import training_configs

    loaded = load(model)
    threshold = as_cascade(loaded).threshold if cascade else None
    skip = skip_unreadable or any(config.data.skip_unreadable for config in training_configs(model))
    dataset = open_readable(data, skip_unreadable=skip, min_domains=1, progress=CountingBar("reading images"))
    warn_skipped(dataset)
    known: list[Uncertainty] = []
    scores = score_domains(loaded, dataset, known, threshold, progress=CountingBar("decoding images"))
    average = sum(score["accuracy"] for score in scores.values()) / len(scores)
    auroc = {} if unknown is None else unknown_auroc_of(loaded, known, find_images([unknown]))
    if as_json:
        result = {"model": str(model), "data": data, "domains": scores, "average": average} | auroc
        print_json(result | ensemble_cost(model, loaded))
        return
    sources = loaded.info.source_domains
    rows = [_row(domain + (" (trained on)" if domain in sources else ""), score) for domain, score in scores.items()]
    headers = ["domain", "accuracy (%)", "images", "ECE", "Brier", "error of the surest 90 % (%)"]
    print_table(headers, [*rows, ["average of domains", percent(average), "", "", "", ""]])
    if cascade:
        _show_cascade(scores)
    for name, value in auroc.items():
        out.print(f"{name.replace('_', ' ')}: {value:.3f}", highlight=False, soft_wrap=True)
    show_cost(model, loaded)


def _show_cascade(scores: Mapping[str, Mapping[str, Any]]) -> None:
    from qtdog.cli.console import print_table
    from qtdog.report.tables import percent

    found = [(domain, score["cascade"]) for domain, score in scores.items()]
    rows = [
        [domain, percent(one["accuracy"]), percent(one["accuracy_all"]), f"{one['members']:.2f}"]
        for domain, one in found
    ]
    print_table(["domain", "with the cascade (%)", "all members (%)", "members asked, mean"], rows)


def _row(name: str, score: Mapping[str, Any]) -> list[str]:
    from qtdog.report.tables import percent

    trust = [f"{score['ece']:.3f}", f"{score['brier']:.3f}", percent(score["risk_at_90"])]
    return [name, percent(score["accuracy"]), f"{score['n']:,}", *trust]
