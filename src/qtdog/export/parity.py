"""Does an exported file answer as the packed model does? Measured on source images, before the file is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import ConfigError, DataError, unknown
from qtdog.core.progress import Progress
from qtdog.core.random import numpy_stream
from qtdog.data.dataset import DomainDataset, map_samples, require_images
from qtdog.data.decoded_cache import content_sha256
from qtdog.export.packed_source import PackedSource
from qtdog.training.load_model import ModelInfo, training_configs
from qtdog.training.protocol import make_protocol


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        pixels: uint8 (n, H, W, C), resized as the model takes them.
        labels: positions in the model's classes (n,).
        domains: where they come from.
        target_included: whether the domain that was held out in training is one of them.
        validation: whether the model was neither trained nor (if held apart) calibrated on them, but selected on them.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    domains: tuple[str, ...]
    target_included: bool = False
    validation: bool = False

    def split(self, n_first: int) -> tuple[LabelledImages, LabelledImages]:
        """Return the first `n_first` images, and the others."""
        parts = (slice(None, n_first), slice(n_first, None))
        first, second = (replace(self, pixels=self.pixels[part], labels=self.labels[part]) for part in parts)
        return first, second


@dataclass(frozen=True)
class Draw:
    """Which images to take.

    Attributes:
        n_images: at most so many, as evenly from the domains as they allow.
        seed: of the draw.
        domains: names; empty for every source domain that the data has.
        force_target: accept the domain that was held out.
    """

    n_images: int
    seed: int = 0
    domains: tuple[str, ...] = ()
    force_target: bool = False


def draw_images(
    dataset: DomainDataset,
    info: ModelInfo,
    draw: Draw,
    progress: Progress = None,
    *,
    only: npt.NDArray[np.bool_] | None = None,
) -> LabelledImages:
    """Return a seeded draw of a data set's source images, in random order.

    Args:
        dataset: the data.
        info: of the model: its domains, classes and preprocessing.
        draw: which images.
        progress: of reading them.
        only: which images of the data set may be drawn (n,); None for all.

    Raises:
        ConfigError: a domain is unknown, or is the target.
        DataError: none of the domains is a source, the data has classes or channels that the model does not know, or an
            image cannot be read.
    """
    images = require_images(dataset)
    domains = choose_domains(dataset, info, draw)
    preprocessing = info.preprocessing
    if dataset.card.channels != preprocessing.channels:
        found = dataset.card.channels
        raise DataError(f"the model takes images of {preprocessing.channels} channels, {dataset.card.name} has {found}")
    pools = [dataset.indices(domain) for domain in domains]
    places = _interleaved(pools if only is None else [pool[only[pool]] for pool in pools], draw)
    names = [dataset.classes[index] for index in dataset.class_index[places]]
    strange = sorted(set(names) - set(info.classes))
    if strange:
        raise DataError(f"{dataset.card.name}: {unknown('class', strange[0], info.classes)}")
    labels = np.array([info.classes.index(name) for name in names], dtype=np.int64)
    read = map_samples(lambda k: images.read_resized(int(places[k]), preprocessing.image_size), len(places), progress)
    shape = (0, preprocessing.image_size, preprocessing.image_size, preprocessing.channels)
    pixels = np.stack(read) if read else np.zeros(shape, dtype=np.uint8)
    return LabelledImages(pixels, labels, domains, info.target_domain in domains)


def validation_images(dataset: DomainDataset, model_file: Path) -> npt.NDArray[np.bool_] | None:
    """Return which images of a data set the runs behind a model file held out from training, bool (n,).

    Of an ensemble's members all must have held an image out. None if that is not known or there are none: no run lies
    beside the file, it was trained on other images, or on the held-out ones too.

    Args:
        dataset: the data.
        model_file: finished model or ensemble.
    """
    configs = training_configs(model_file)
    content = content_sha256(dataset) if configs else ""
    held_out = np.ones(len(dataset.class_index), dtype=bool)
    for config in configs:
        if config.data.content != content or config.data.train_on_heldout:
            return None
        mask = np.zeros(len(held_out), dtype=bool)
        for part in make_protocol(config, dataset).selection_sets().values():
            mask[part] = True
        held_out &= mask
    return held_out if configs and held_out.any() else None


def draw_export_images(
    dataset: DomainDataset,
    source: PackedSource,
    draw: Draw,
    n_calibration: int,
    watch: Callable[[str], Progress] = lambda title: None,
) -> tuple[LabelledImages, LabelledImages]:
    """Return the images that an export is calibrated on, and those that it is compared on.

    Where the run is known, these are training images, and images that it held out; else a draw of all in two parts.

    Args:
        dataset: the data.
        source: the packed model.
        draw: which images to compare on.
        n_calibration: how many at most to calibrate on; 0 for none.
        watch: from the title of a long piece of work to the callback that reports its progress.

    Raises:
        ConfigError, DataError: as in `draw_images`.
    """
    info, title = source.infos[0], "reading images"
    held_out = validation_images(dataset, source.path)
    if held_out is None or draw.force_target:
        both = draw_images(dataset, info, replace(draw, n_images=draw.n_images + n_calibration), watch(title))
        return both.split(min(n_calibration, len(both.pixels) // 2))
    check = draw_images(dataset, info, draw, watch(title), only=held_out)
    first = replace(draw, n_images=n_calibration)
    calibration = draw_images(dataset, info, first, watch(title) if n_calibration else None, only=~held_out)
    return calibration, replace(check, validation=True)


def choose_domains(dataset: DomainDataset, info: ModelInfo, draw: Draw) -> tuple[str, ...]:
    """Return the domains to draw from: those asked for, else every source domain that the data has.

    Raises:
        ConfigError: a domain is unknown, or is the target and that is not forced.
        DataError: the data has no source domain.
    """
    for domain in draw.domains:
        if domain not in dataset.domains:
            raise ConfigError(unknown("domain", domain, dataset.domains))
    target = info.target_domain
    chosen = draw.domains or tuple(domain for domain in dataset.domains if domain in info.source_domains)
    only_target = not chosen and target in dataset.domains
    if only_target and draw.force_target:
        chosen = (str(target),)
    if (target in chosen or only_target) and not draw.force_target:
        text = f"'{target}' was held out in training: calibrating or checking on it would tell the model about it"
        raise ConfigError(f"{text}. Give images of {', '.join(info.source_domains)}, or --force-target")
    if not chosen:
        have, want = ", ".join(dataset.domains), ", ".join(info.source_domains)
        raise DataError(f"{dataset.card.name} has the domains {have}, the model was trained on {want}: give those")
    return chosen


def _interleaved(pools: Sequence[npt.NDArray[np.int64]], draw: Draw) -> npt.NDArray[np.int64]:
    """Return at most `n_images` of the pools' entries, taken in turns, so that any beginning is balanced too."""
    orders = [numpy_stream(draw.seed, "export", index).permutation(pool) for index, pool in enumerate(pools)]
    turns = [order[turn] for turn in range(max(map(len, orders))) for order in orders if turn < len(order)]
    return np.array(turns[: draw.n_images], dtype=np.int64)


Ask = Callable[[npt.NDArray[np.uint8]], dict[str, Any]]
BATCH = 32


@dataclass(frozen=True)
class ParityLimits:
    """How far an exported file may be from the packed model.

    Attributes:
        agreement_frac: least share of images with the same first choice.
        logits: largest difference of a logit, as a share of the largest logit (and at least of 1); None for no limit.
        accuracy_loss: largest loss of accuracy, beyond what chance explains (two standard errors); None for no limit.
    """

    agreement_frac: float
    logits: float | None = None
    accuracy_loss: float | None = None


FLOAT = ParityLimits(agreement_frac=0.999, logits=1e-4)
INTEGER = ParityLimits(agreement_frac=0.8, accuracy_loss=0.005)
ROUNDED = ParityLimits(agreement_frac=0.9, accuracy_loss=0.005)
"""Of a float graph that rounds activations as training did: a value half-way between two points may fall to either."""


@dataclass(frozen=True)
class Parity:
    """How an exported file compares with the packed model.

    Attributes:
        n_images: compared.
        domains: of these images.
        agreement_frac: share with the same first choice.
        max_difference: of each output, by name.
        rms_difference: of the logits.
        largest_logit: of the packed model, absolute.
        accuracy_packed: share of right answers of the packed model.
        accuracy_exported: of the exported file.
        n_lost: images that only the packed model gets right.
        n_gained: images that only the exported file gets right.
        validation: whether the images were held out from training; else the model may have been trained on them.
    """

    n_images: int
    domains: tuple[str, ...]
    agreement_frac: float
    max_difference: dict[str, float]
    rms_difference: float
    largest_logit: float
    accuracy_packed: float
    accuracy_exported: float
    n_lost: int
    n_gained: int
    validation: bool = False

    @property
    def accuracy_loss(self) -> float:
        """Accuracy of the packed model less that of the exported file."""
        return self.accuracy_packed - self.accuracy_exported

    @property
    def standard_error(self) -> float:
        """Of the accuracy loss: √(lost + gained) / n, as in McNemar's test of paired answers."""
        return math.sqrt(self.n_lost + self.n_gained) / self.n_images

    def problems(self, limits: ParityLimits) -> list[str]:
        """Return in words where the limits are passed; empty if they are kept."""
        found = []
        if self.agreement_frac < limits.agreement_frac:
            found.append(f"the same class on {self.agreement_frac:.2%}, expected at least {limits.agreement_frac:.1%}")
        size = max(1.0, self.largest_logit)
        worst = self.max_difference["logits"]
        if limits.logits is not None and not worst <= limits.logits * size:
            found.append(f"a logit is off by {worst:.2g}, expected at most {limits.logits * size:.2g}")
        if limits.accuracy_loss is not None and self.accuracy_loss - 2 * self.standard_error > limits.accuracy_loss:
            loss, allowed = 100 * self.accuracy_loss, 100 * limits.accuracy_loss
            found.append(f"{loss:.2f} points of accuracy lost, expected at most {allowed:.2f} beyond chance")
        return found


def images_of(parity: Parity) -> str:
    """Return in words what images a file was compared on.

    Example:
        >>> images_of(Parity(9, ("a", "b"), 1, {}, 0, 1, 1, 1, 0, 0, validation=True))
        'validation images of a, b'
    """
    kind = "validation images" if parity.validation else "images (some of which it was trained on)"
    return f"{kind} of {', '.join(parity.domains)}"


def measure_parity(packed: Ask, exported: Ask, images: LabelledImages, progress: Progress = None) -> Parity:
    """Return how an exported file compares with the packed model on the same images.

    Args:
        packed: uint8 images to outputs by name.
        exported: likewise.
        images: at least one.
        progress: called with images done and to do.

    Example:
        >>> pixels = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
        >>> def ask(images):
        ...     return {"logits": np.stack([images.reshape(-1), np.full(len(images), 1.5)], 1).astype(np.float32)}
        >>> images = LabelledImages(pixels, np.array([1, 1, 0, 0]), ("a",))
        >>> found = measure_parity(ask, lambda x: {"logits": -ask(x)["logits"]}, images)
        >>> found.agreement_frac, found.accuracy_packed, found.problems(FLOAT)[0]
        (0.0, 1.0, 'the same class on 0.00%, expected at least 99.9%')
    """
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for start in range(0, len(images.pixels), BATCH):
        part = images.pixels[start : start + BATCH]
        ours.append(packed(part))
        theirs.append(exported(part))
        if progress is not None:
            progress(min(start + BATCH, len(images.pixels)), len(images.pixels))
    one, other = ({name: np.concatenate([part[name] for part in side]) for name in side[0]} for side in (ours, theirs))
    apart = {name: np.subtract(one[name], other[name], dtype=np.float32) for name in one}
    choices = one["logits"].argmax(1), other["logits"].argmax(1)
    right = choices[0] == images.labels, choices[1] == images.labels
    return Parity(
        n_images=len(images.pixels),
        domains=images.domains,
        agreement_frac=float((choices[0] == choices[1]).mean()),
        max_difference={name: float(np.abs(difference).max()) for name, difference in apart.items()},
        rms_difference=float(np.sqrt(np.square(apart["logits"]).mean())),
        largest_logit=float(np.abs(one["logits"]).max()),
        accuracy_packed=float(right[0].mean()),
        accuracy_exported=float(right[1].mean()),
        n_lost=int((right[0] & ~right[1]).sum()),
        n_gained=int((right[1] & ~right[0]).sum()),
        validation=images.validation,
    )
