"""`qtdog eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from qtdog.data.dataset import DomainDataset
    from qtdog.training.shipped import ShippedModel


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model.safetensors that 'qtdog train' wrote.", metavar="MODEL")],
    data: Annotated[str, typer.Argument(help="Data set name, folder DOMAIN/CLASS/image, or manifest.", metavar="DATA")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a model on every domain of a data set (all images; classes are matched by name).

    Examples:
      qtdog eval runs/photos-c/model.safetensors photos/

      qtdog eval model.safetensors new-site/ --json
    """
    from qtdog.cli.console import print_json, print_table
    from qtdog.data.open import open_dataset
    from qtdog.report.table import percent
    from qtdog.training.shipped import load

    shipped = load(model)
    dataset = open_dataset(data, min_domains=1)
    scores = score_domains(shipped, dataset)
    average = sum(score["accuracy"] for score in scores.values()) / len(scores)
    if as_json:
        print_json({"model": str(model), "data": data, "domains": scores, "average": average})
        return
    sources = shipped.info.source_domains
    rows = [
        [domain + (" (trained on)" if domain in sources else ""), percent(score["accuracy"]), f"{score['n']:,}"]
        for domain, score in scores.items()
    ]
    print_table(["domain", "accuracy (%)", "images"], [*rows, ["average of domains", percent(average), ""]])


def score_domains(shipped: ShippedModel, dataset: DomainDataset) -> dict[str, dict[str, Any]]:
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
    network = shipped.network.to(accelerator.device)
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
