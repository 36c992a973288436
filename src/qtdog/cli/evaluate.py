"""`qtdog eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from qtdog.data.dataset import DomainDataset
    from qtdog.ensemble.model import EnsembleModel
    from qtdog.training.shipped import ShippedModel


def evaluate(
    model: Annotated[Path, typer.Argument(help="A .safetensors file of 'qtdog train' or 'ensemble'.", metavar="MODEL")],
    data: Annotated[str, typer.Argument(help="Data set name, folder DOMAIN/CLASS/image, or manifest.", metavar="DATA")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on every domain of a data set (all images; classes are matched by name).

    Examples:
      qtdog eval runs/photos-c/model.safetensors photos/

      qtdog eval runs/five/c-eoq/model.safetensors photos/        (an ensemble: its cost is shown too)

      qtdog eval model.safetensors new-site/ --json
    """
    from qtdog.cli.console import print_json, print_table
    from qtdog.data.open import open_dataset
    from qtdog.ensemble.load import load_any
    from qtdog.report.table import percent

    shipped = load_any(model)
    dataset = open_dataset(data, min_domains=1)
    scores = score_domains(shipped, dataset)
    average = sum(score["accuracy"] for score in scores.values()) / len(scores)
    if as_json:
        told = {"model": str(model), "data": data, "domains": scores, "average": average}
        print_json(told | ensemble_cost(model, shipped))
        return
    sources = shipped.info.source_domains
    rows = [
        [domain + (" (trained on)" if domain in sources else ""), percent(score["accuracy"]), f"{score['n']:,}"]
        for domain, score in scores.items()
    ]
    print_table(["domain", "accuracy (%)", "images"], [*rows, ["average of domains", percent(average), ""]])
    say_cost(model, shipped)


def ensemble_cost(path: Path, model: ShippedModel | EnsembleModel) -> dict[str, Any]:
    """Return what an ensemble is and costs (`size`, `training_steps`, `training_runs`, `inference_passes`), else {}."""
    from dataclasses import asdict

    from qtdog.ensemble.model import EnsembleModel
    from qtdog.packing.ensemble_sizes import ensemble_sizes

    if not isinstance(model, EnsembleModel):
        return {}
    info, n_members = model.info, len(model.members)
    told = {"kind": info.kind, "n_members": n_members, "size": asdict(ensemble_sizes(path))}
    steps = {"training_steps": info.training_steps, "training_runs": info.training_runs}
    return told | steps | {"inference_passes": n_members}


def say_cost(path: Path, model: ShippedModel | EnsembleModel) -> None:
    """Print what an ensemble costs beside one model to standard error; nothing for one model."""
    from qtdog.cli.console import err
    from qtdog.report.cost_table import cost_line

    told = ensemble_cost(path, model)
    if told:
        text = f"{told['kind']} of {told['n_members']} members: {cost_line(told['size'], told)}"
        err.print(text, highlight=False, markup=False, soft_wrap=True)


def score_domains(shipped: ShippedModel | EnsembleModel, dataset: DomainDataset) -> dict[str, dict[str, Any]]:
    """Return accuracy, loss and number of images for each domain of the data set.

    Raises:
        DataError: the data set has a class that the model does not know, other channels, or an unreadable image.
    """
    from dataclasses import asdict

    from accelerate import Accelerator

    from qtdog.cli.progress import CountingBar
    from qtdog.core.errors import DataError
    from qtdog.data.cache import open_cache
    from qtdog.data.loader import eval_batches
    from qtdog.training.evaluate import evaluate as measure

    how = shipped.info.preprocessing
    if dataset.sheet.channels != how.channels:
        found = dataset.sheet.channels
        raise DataError(f"the model takes images of {how.channels} channels, {dataset.sheet.name} has {found}")
    labels = model_labels(shipped.info.classes, dataset)
    cache = open_cache(dataset, how.image_size, progress=CountingBar("decoding images"))
    accelerator = Accelerator()
    network = shipped.to(accelerator.device)
    scores = {}
    for domain in dataset.domains:
        batches = eval_batches(cache, dataset.indices(domain), labels, batch_size=128, mean=how.mean, std=how.std)
        scores[domain] = asdict(measure(network, batches, accelerator))
    return scores


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
