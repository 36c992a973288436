"""Some domains of a data set, as if the others did not exist."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError
from qtdog.data.dataset import DomainDataset
from qtdog.data.sheet import Datasheet


class DomainSubset(DomainDataset):
    """The images of some domains of another data set, in the same order; nothing asks for an image of the others.

    Content, signature and decoded cache are those of the kept images alone, so that a change in another domain changes
    nothing here. The classes are those of the whole, so that labels mean the same.

    Args:
        dataset: the whole.
        domains: names of the domains to keep.

    Raises:
        DataError: a name is no domain of `dataset`, or none is kept.

    Example:
        >>> from qtdog.data.digits import RotatedDigits
        >>> subset = DomainSubset(RotatedDigits(), ["15", "0"])
        >>> subset.domains, len(subset)
        (('0', '15'), 600)
    """

    def __init__(self, dataset: DomainDataset, domains: Collection[str]) -> None:
        if not domains:
            raise DataError(f"no domain of {dataset.sheet.name} is kept; it has {', '.join(dataset.domains)}")
        places = np.sort(np.concatenate([dataset.indices(domain) for domain in sorted(set(domains))]))
        kept = [d for d, domain in enumerate(dataset.domains) if domain in domains]
        self.domains = tuple(dataset.domains[d] for d in kept)
        self.classes = dataset.classes
        self.sheet = _restricted(dataset.sheet, self.domains)
        self.keys = [dataset.keys[place] for place in places]
        self.domain_index = np.searchsorted(kept, dataset.domain_index[places]).astype(np.int16)
        self.class_index = dataset.class_index[places]
        self.parts = None if dataset.parts is None else dataset.parts[places]
        self.skipped = [(key, why) for key, why in dataset.skipped if key.split("/", 1)[0] in domains]
        self._dataset = dataset
        self._places = places.tolist()

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i of the subset at its native size, uint8 (H, W, C) (DataError if it cannot be read)."""
        return self._dataset.read(self._places[i])

    def read_resized(self, i: int, size: int) -> npt.NDArray[np.uint8]:
        """Return image i of the subset as uint8 (size, size, C) (DataError if it cannot be read)."""
        return self._dataset.read_resized(self._places[i], size)

    def sample_signature(self, i: int) -> str:
        """Return the whole data set's fingerprint of image i of the subset."""
        return self._dataset.sample_signature(self._places[i])

    def sample_change_ns(self, i: int) -> int:
        """Return when image i of the subset was changed last."""
        return self._dataset.sample_change_ns(self._places[i])

    def sample_sha256(self, i: int) -> str:
        """Return the hex sha256 of the stored content of image i of the subset (DataError if it cannot be had)."""
        return self._dataset.sample_sha256(self._places[i])


def _restricted(sheet: Datasheet, domains: tuple[str, ...]) -> Datasheet:
    """Return the datasheet as it is for these domains."""
    counts = sheet.expected_counts
    return replace(
        sheet,
        domains=None if sheet.domains is None else tuple(name for name in sheet.domains if name in domains),
        expected_counts=None if counts is None else {name: n for name, n in counts.items() if name in domains},
    )
