"""Source images that an export is calibrated on and checked with; never the target's, unless forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import ConfigError, DataError, unknown
from qtdog.core.progress import Progress
from qtdog.core.random import numpy_stream
from qtdog.data.dataset import DomainDataset, map_samples
from qtdog.training.load_model import ModelInfo


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        pixels: uint8 (n, H, W, C), resized as the model takes them.
        labels: positions in the model's classes (n,).
        domains: where they come from.
        target_included: whether the domain that was held out in training is one of them.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    domains: tuple[str, ...]
    target_included: bool = False

    def split(self, n_first: int) -> tuple[LabelledImages, LabelledImages]:
        """Return the first `n_first` images, and the others."""
        parts = (slice(None, n_first), slice(n_first, None))
        first, second = (
            LabelledImages(self.pixels[part], self.labels[part], self.domains, self.target_included) for part in parts
        )
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


def draw_images(dataset: DomainDataset, info: ModelInfo, draw: Draw, progress: Progress = None) -> LabelledImages:
    """Return a seeded draw of a data set's source images, in random order.

    Args:
        dataset: the data.
        info: of the model: its domains, classes and preprocessing.
        draw: which images.
        progress: of reading them.

    Raises:
        ConfigError: a domain is unknown, or is the target.
        DataError: none of the domains is a source, the data has classes or channels that the model does not know, or an
            image cannot be read.
    """
    domains = choose_domains(dataset, info, draw)
    how = info.preprocessing
    if dataset.card.channels != how.channels:
        found = dataset.card.channels
        raise DataError(f"the model takes images of {how.channels} channels, {dataset.card.name} has {found}")
    places = _interleaved([dataset.indices(domain) for domain in domains], draw)
    names = [dataset.classes[index] for index in dataset.class_index[places]]
    strange = sorted(set(names) - set(info.classes))
    if strange:
        raise DataError(f"{dataset.card.name}: {unknown('class', strange[0], info.classes)}")
    labels = np.array([info.classes.index(name) for name in names], dtype=np.int64)
    read = map_samples(lambda k: dataset.read_resized(int(places[k]), how.image_size), len(places), progress)
    return LabelledImages(np.stack(read), labels, domains, info.target_domain in domains)


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
