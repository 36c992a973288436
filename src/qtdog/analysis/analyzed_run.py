"""A finished run as the run of an analysis: its model, latent weights, roles of domains, a subset of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qtdog.core.config import Config, config_hash
from qtdog.core.errors import ConfigError, DataError
from qtdog.core.progress import Progress
from qtdog.core.random import numpy_stream
from qtdog.data.dataset import DomainDataset
from qtdog.data.decoded_cache import content_sha256
from qtdog.data.open import open_readable, recorded_source
from qtdog.runs.find import require_run
from qtdog.runs.folder import RunFolder
from qtdog.training.load_model import LoadedModel, load_model
from qtdog.training.protocol import DomainProtocol, make_protocol, open_inputs

ID_DIGITS = 12


@dataclass(frozen=True)
class Images:
    """Some images of one domain.

    Attributes:
        pixels: uint8 (n, H, W, C), on the CPU; of texts their tokens, int64 (n, length).
        labels: int64 (n,), positions in the classes of the data set.
        keys: the name of each in the data set.
    """

    pixels: Tensor
    labels: Tensor
    keys: tuple[str, ...]


@dataclass(frozen=True)
class AnalyzedRun:
    """One finished run.

    Attributes:
        label: how it is called in figures, unlike that of any other run beside it.
        folder: of the run.
        config: its configuration.
        model: what it is saved: plain, dequantized weights, in evaluation mode.
        dataset: the images it was made from.
        protocol: which domains are sources, which is the target, which images are held out.
        id: the beginning of the sha256 of its model file: what is measured of the run holds for this file.
    """

    label: str
    folder: RunFolder
    config: Config
    model: LoadedModel
    dataset: DomainDataset
    protocol: DomainProtocol
    id: str

    @property
    def target(self) -> str | None:
        """The unseen domain, or None."""
        return self.protocol.target

    @property
    def domains(self) -> tuple[str, ...]:
        """The sources, then the target."""
        return (*self.protocol.sources, *([self.target] if self.target else []))

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """The domains of each role, `sources` and, if there is one, `target`."""
        return {"sources": self.protocol.sources} | ({"target": (self.target,)} if self.target else {})

    def to_json(self) -> dict[str, Any]:
        """Return what `analysis.json` says of the run."""
        return describe_run(self.label, self.folder, self.config) | {"model": self.id}


def describe_run(label: str, folder: RunFolder, config: Config) -> dict[str, Any]:
    """Return what `analysis.json` says of a run, finished or not."""
    return {"label": label, "folder": str(folder.path), "config_hash": config_hash(config)}


def open_analyzed_runs(
    paths: Sequence[Path],
    labels: Sequence[str],
    *,
    data: str | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = None,
) -> list[AnalyzedRun]:
    """Return finished runs on one data set, ready to be analysed.

    Args:
        paths: run folders.
        labels: how each is called.
        data: where the data set lies now, if not where the first run found it.
        device: where the models go.
        progress: of hashing the images.

    Raises:
        RunError, ConfigError: as in `runs.find.require_run`.
        DataError: the data set is not the one of a run, or the runs have different ones.
        FormatError, ModelError: as in `training.load_model.load`.
    """
    runs = [require_run(path) for path in paths]
    source = data or runs[0].config.data.source
    skip = any(run.config.data.skip_unreadable for run in runs)
    with recorded_source(source, is_recorded=not data):
        dataset = open_readable(source, skip_unreadable=skip, progress=progress)
    content = content_sha256(dataset, progress=progress)
    for run in runs:
        if run.config.data.content != content:
            text = f"{run.folder.path} was trained on other images than those in {source}"
            raise DataError(f"{text}: analyses compare runs on one data set (--data says where it lies)")
    return [
        AnalyzedRun(
            label=label,
            folder=run.folder,
            config=run.config,
            model=load_model(run.folder.model_file, device=device),
            dataset=dataset,
            protocol=make_protocol(run.config, dataset),
            id=run.model_sha256[:ID_DIGITS],
        )
        for label, run in zip(labels, runs, strict=True)
    ]


def domain_images(run: AnalyzedRun, domain: str, n: int | None, seed: int, progress: Progress = None) -> Images:
    """Return a fixed subset of a domain: of a source its held-out images, of the target any.

    None of them was trained on. The draw depends on seed and domain alone, so that runs of one trial, size and target
    see the same images.

    Args:
        run: the run.
        domain: one of `run.domains`.
        n: how many; None for all, and all if there are fewer.
        seed: of the draw.
        progress: of decoding.

    Raises:
        ConfigError: the run kept no images of its sources back.
        DataError: an image cannot be read.
    """
    split = run.protocol.splits[domain]
    if domain != run.target and run.protocol.train_on_heldout:
        raise ConfigError(f"{run.folder.path} trained on all images of its sources: none is left to measure on")
    pool = np.sort(split.everything if domain == run.target else split.heldout)
    if n is not None and n < len(pool):
        pool = np.sort(numpy_stream(seed, "analysis", domain).choice(pool, n, replace=False))
    return _gathered(run, pool, progress)


def _gathered(run: AnalyzedRun, indices: np.ndarray, progress: Progress = None) -> Images:
    data, words = run.config.data, run.model.info.preprocessing.vocabulary
    options = {"image_size": data.image_size, "max_tokens": data.max_tokens, "words": words, "progress": progress}
    cache = open_inputs(run.dataset, run.config.model.backbone, **options)
    labels = torch.from_numpy(run.dataset.class_index[indices].astype(np.int64))
    return Images(cache.gather(indices), labels, tuple(run.dataset.keys[i] for i in indices))


def all_images(run: AnalyzedRun, n: int | None, seed: int, progress: Progress = None) -> dict[str, Images]:
    """Return `domain_images` of every domain of a run, by name.

    Raises:
        ConfigError, DataError: as in `domain_images`.
    """
    return {domain: domain_images(run, domain, n, seed, progress) for domain in run.domains}


def training_images(run: AnalyzedRun, n: int, seed: int) -> Images:
    """Return a fixed subset of the training images of every source, one source after another, never of the target.

    Args:
        run: the run.
        n: of each source; all if there are fewer.
        seed: of the draw.

    Raises:
        DataError: an image cannot be read.
    """
    pools = run.protocol.train_pools()
    drawn = [
        np.sort(numpy_stream(seed, "analysis", "train", domain).choice(pool, min(n, len(pool)), replace=False))
        for domain, pool in pools.items()
    ]
    return _gathered(run, np.concatenate(drawn))


BATCH = 128


def batches(model: LoadedModel, images: Images, *, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, labels) as the model takes them, on its device, in order."""
    device = next(model.network.parameters()).device
    for pixels, labels in zip(images.pixels.split(size), images.labels.split(size), strict=True):
        yield model.prepare(pixels).to(device), labels.to(device)


@torch.no_grad()
def logits(model: LoadedModel, images: Images, *, check: Callable[[], None] = lambda: None) -> Tensor:
    """Return the logits (n, n_classes) of images, on the CPU.

    Args:
        model: in evaluation mode.
        images: as they are stored.
        check: called before each batch; may raise to break off.
    """
    answers = []
    for prepared, _ in batches(model, images):
        check()
        answers.append(model(prepared).float().cpu())
    return torch.cat(answers)


def losses_by_domain(
    model: LoadedModel, domains: Mapping[str, Images], *, check: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the mean cross-entropy of each domain: one pass over all its images.

    Raises:
        whatever `check` raises.
    """
    return {
        domain: functional.cross_entropy(logits(model, images, check=check).double(), images.labels).item()
        for domain, images in domains.items()
    }


def role_mean(losses: Mapping[str, float | str], domains: tuple[str, ...]) -> float:
    """Return the mean over some domains, each counting once whatever its size; losses may be a row of `points.csv`.

    Example:
        >>> role_mean({"a": 1.0, "b": "2.0", "c": 9.0}, ("a", "b"))
        1.5
    """
    return sum(float(losses[domain]) for domain in domains) / len(domains)


def shift(progress: Progress, before: int, total: int) -> Progress:
    """Return the progress of a part as progress of the whole: (done, n) becomes (before + done, total).

    Example:
        >>> shift(lambda done, total: print(done, total), 10, 30)(5, 10)
        15 30
    """
    return None if progress is None else lambda done, n: progress(before + done, total)
