"""`qtdog eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from qtdog.data.dataset import DomainDataset
    from qtdog.ensemble.model import EnsembleModel
    from qtdog.ensemble.uncertainty import Doubt
    from qtdog.training.load import LoadedModel

CASCADE = "Say too what an ensemble reaches if members are asked only until the first ones agree confidently."


def evaluate(
    model: Annotated[Path, typer.Argument(help="A .safetensors file of 'qtdog train' or 'ensemble'.", metavar="MODEL")],
    data: Annotated[str, typer.Argument(help="Data set name, folder DOMAIN/CLASS/image, or manifest.", metavar="DATA")],
    *,
    unknown: Annotated[
        Path | None, typer.Option(help="Folder of images of unknown kinds: can the model's doubt tell them apart?")
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read, and say how many.")
    ] = False,
    cascade: Annotated[bool, typer.Option("--cascade", help=CASCADE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on every domain of a data set (all images; classes are matched by name).

    Beside the accuracy: expected calibration error and Brier score of the probabilities, and the error that is left
    when the least certain tenth is not answered. With --unknown, the area under the ROC curve (0.5 is chance, 1 is
    perfect) of the doubt on these images against that on the data set.

    Examples:
      qtdog eval runs/photos-c/model.safetensors photos/

      qtdog eval runs/five/c-eoq/model.safetensors photos/        (an ensemble: its cost is shown too)

      qtdog eval runs/five/c-eoq/model.safetensors photos/ --cascade

      qtdog eval model.safetensors new-site/ --unknown other-things/ --json
    """
    from qtdog.cli.console import CountingBar, out, print_json, print_table
    from qtdog.cli.predict import cascading
    from qtdog.data.open import open_any, without_unreadable
    from qtdog.ensemble.model import load
    from qtdog.report.tables import percent

    shipped = load(model)
    threshold = cascading(shipped).threshold if cascade else None
    dataset = open_any(data, min_domains=1)
    if skip_unreadable:
        dataset = without_unreadable(dataset, CountingBar("reading images"))
    known: list[Doubt] = []
    scores = score_domains(shipped, dataset, known, threshold)
    average = sum(score["accuracy"] for score in scores.values()) / len(scores)
    apart = {} if unknown is None else tell_apart(shipped, known, unknown)
    if as_json:
        told = {"model": str(model), "data": data, "domains": scores, "average": average} | apart
        print_json(told | ensemble_cost(model, shipped))
        return
    sources = shipped.info.source_domains
    rows = [_row(domain + (" (trained on)" if domain in sources else ""), score) for domain, score in scores.items()]
    headers = ["domain", "accuracy (%)", "images", "ECE", "Brier", "error of the surest 90 % (%)"]
    print_table(headers, [*rows, ["average of domains", percent(average), "", "", "", ""]])
    if cascade:
        _show_cascade(scores)
    for name, value in apart.items():
        out.print(f"{name.replace('_', ' ')}: {value:.3f}", highlight=False)
    say_cost(model, shipped)


def _show_cascade(scores: Mapping[str, Mapping[str, Any]]) -> None:
    from qtdog.cli.console import print_table
    from qtdog.report.tables import percent

    told = [(domain, score["cascade"]) for domain, score in scores.items()]
    rows = [
        [domain, percent(one["accuracy"]), percent(one["accuracy_all"]), f"{one['members']:.2f}"]
        for domain, one in told
    ]
    print_table(["domain", "with the cascade (%)", "all members (%)", "members asked, mean"], rows)


def _row(name: str, score: Mapping[str, Any]) -> list[str]:
    from qtdog.report.tables import percent

    trust = [f"{score['ece']:.3f}", f"{score['brier']:.3f}", percent(score["risk_at_90"])]
    return [name, percent(score["accuracy"]), f"{score['n']:,}", *trust]


def tell_apart(shipped: LoadedModel | EnsembleModel, known: Sequence[Doubt], folder: Path) -> dict[str, float]:
    """Return how well doubt tells the images below `folder` from known ones: AUROC of entropy and disagreement.

    Raises:
        DataError: the folder is missing or holds no image, or one of them cannot be read.
    """
    import torch

    from qtdog.cli.predict import find_images, predictions
    from qtdog.core.errors import QtdogError
    from qtdog.ensemble.uncertainty import unknown_auroc

    rows = list(predictions(shipped, find_images([folder])))
    for row in rows:
        if isinstance(row, QtdogError):
            raise row
    told = {}
    for name in ("entropy", "mutual_information"):
        if name in rows[0]:
            values = torch.cat([getattr(doubt, name) for doubt in known])
            told[f"unknown_auroc_{name}"] = unknown_auroc(values.numpy(), [row[name] for row in rows])
    return told


def ensemble_cost(path: Path, model: LoadedModel | EnsembleModel) -> dict[str, Any]:
    """Return what an ensemble is and costs (`size`, `training_steps`, `training_runs`, `inference_passes`), else {}."""
    from dataclasses import asdict

    from qtdog.ensemble.model import EnsembleModel
    from qtdog.packing.sizes import ensemble_sizes

    if not isinstance(model, EnsembleModel):
        return {}
    info, n_members = model.info, len(model.members)
    told = {"kind": info.kind, "n_members": n_members, "size": asdict(ensemble_sizes(path))}
    steps = {"training_steps": info.training_steps, "training_runs": info.training_runs}
    return told | steps | {"inference_passes": n_members}


def say_cost(path: Path, model: LoadedModel | EnsembleModel) -> None:
    """Print what an ensemble costs beside one model to standard error; nothing for one model."""
    from qtdog.cli.console import err
    from qtdog.report.tables import cost_line

    told = ensemble_cost(path, model)
    if told:
        text = f"{told['kind']} of {told['n_members']} members: {cost_line(told['size'], told)}"
        err.print(text, highlight=False, markup=False, soft_wrap=True)


def score_domains(
    shipped: LoadedModel | EnsembleModel,
    dataset: DomainDataset,
    doubts: list[Doubt] | None = None,
    threshold: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Return accuracy, loss, number of images and reliability for each domain of the data set.

    Args:
        shipped: the model.
        dataset: the images.
        doubts: where to put the doubt of each domain's images besides.
        threshold: of a cascade, whose accuracy and members asked on average are told besides.

    Raises:
        ConfigError: the data set is of texts and the model takes images, or the other way round.
        DataError: the data set has a class that the model does not know, other channels, or an unreadable image.
    """
    from accelerate import Accelerator

    from qtdog.cli.console import CountingBar
    from qtdog.core.errors import DataError
    from qtdog.data.loader import eval_batches
    from qtdog.ensemble.evaluation import collect, temperature_of
    from qtdog.training.protocol import check_reads, open_inputs

    how = shipped.info.preprocessing
    check_reads(shipped.info.backbone, dataset)
    if dataset.card.channels != how.channels:
        found = dataset.card.channels
        raise DataError(f"the model takes images of {how.channels} channels, {dataset.card.name} has {found}")
    labels = model_labels(shipped.info.classes, dataset)
    sizes = {"image_size": how.image_size, "max_tokens": how.max_tokens}
    words, progress = how.vocabulary, CountingBar("decoding images")
    cache = open_inputs(dataset, shipped.info.backbone, **sizes, words=words, progress=progress)
    device = Accelerator().device
    model = shipped.to(device)
    scores = {}
    for domain in dataset.domains:
        batches = eval_batches(cache, dataset.indices(domain), labels, batch_size=128, mean=how.mean, std=how.std)
        logits, true = collect(model, batches, device)
        scores[domain] = _score(shipped, logits, true, doubts)
        if threshold is not None:
            scores[domain]["cascade"] = _with_cascade(logits, true, threshold, temperature_of(shipped))
    return scores


def _score(
    shipped: LoadedModel | EnsembleModel, logits: Tensor, labels: Tensor, doubts: list[Doubt] | None
) -> dict[str, Any]:
    from dataclasses import asdict

    from torch.nn.functional import cross_entropy

    from qtdog.ensemble.evaluation import answers, reliability, temperature_of

    mean = logits.mean(0)
    found = answers(logits, temperature_of(shipped))
    if doubts is not None:
        doubts.append(found.doubt)
    right = (mean.argmax(1) == labels).double().mean().item()
    score = {"accuracy": right, "loss": cross_entropy(mean, labels).item(), "n": len(labels)}
    return score | asdict(reliability(found, labels))


def _with_cascade(logits: Tensor, labels: Tensor, threshold: float, temperature: float) -> dict[str, float]:
    from dataclasses import asdict

    from qtdog.ensemble.cascade import measure

    found = asdict(measure(logits, labels, threshold, temperature))
    return {key: found[key] for key in ("accuracy", "accuracy_all", "members")}


def model_labels(classes: tuple[str, ...], dataset: DomainDataset) -> np.ndarray:
    """Return the model's class index of each image, matching classes by name.

    Raises:
        DataError: the data set has a class that the model does not know.
    """
    import numpy as np

    from qtdog.core.errors import DataError, nearest

    unknown = [name for name in dataset.classes if name not in classes]
    if unknown:
        close = nearest(unknown[0], classes)
        hint = f" (did you mean '{close}'?)" if close else ""
        text = f"the model does not know class '{unknown[0]}'{hint}; it knows {', '.join(classes)}."
        raise DataError(f"{text} Rename or remove that folder.")
    mapping = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    return mapping[dataset.class_index]
