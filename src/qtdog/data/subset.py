"""Some domains of a data set, as if the others did not exist."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from qtdog.core.errors import DataError
from qtdog.data.dataset import DomainDataset
from qtdog.data.picked import PickedImages
from qtdog.data.sheet import Datasheet


class DomainSubset(PickedImages):
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
        names = tuple(dataset.domains[d] for d in kept)
        super().__init__(dataset, places, kept, _restricted(dataset.sheet, names))


def _restricted(sheet: Datasheet, domains: tuple[str, ...]) -> Datasheet:
    """Return the datasheet as it is for these domains."""
    counts = sheet.expected_counts
    return replace(
        sheet,
        domains=None if sheet.domains is None else tuple(name for name in sheet.domains if name in domains),
        expected_counts=None if counts is None else {name: n for name, n in counts.items() if name in domains},
    )
