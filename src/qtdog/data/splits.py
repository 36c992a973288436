"""Which images are trained on, selected on and reported on: DomainBed's rule, a pure function of (trial, domain).

And which of them get a wrong label, as a study tool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qtdog.core.errors import DataError
from qtdog.core.random import numpy_stream
from qtdog.data.dataset import ID_TEST, ID_VAL, TRAIN, DomainDataset

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Dataset indices of one domain.

    Attributes:
        train: trained on.
        heldout: held out for selection.
        test: held out for the report of the in-domain mode; empty in the target mode.
    """

    train: Indices
    heldout: Indices
    test: Indices

    @property
    def everything(self) -> Indices:
        """All indices of the domain, ascending."""
        return np.sort(np.concatenate([self.train, self.heldout, self.test]))


@dataclass(frozen=True)
class DomainSplits:
    """The split of every domain, by domain name in sorted order."""

    domains: dict[str, Split]

    def __getitem__(self, domain: str) -> Split:
        """Return the split of a domain."""
        return self.domains[domain]


def make_splits(
    dataset: DomainDataset,
    *,
    frac: float = 0.2,
    trial: int = 0,
    test_mode: Literal["target", "in-domain"] = "target",
) -> DomainSplits:
    """Return every domain's split; in the "in-domain" mode a second part of the same size is set aside for the report.

    An official division (`dataset.official_split`) is kept in the target mode: train, id_val and id_test of the
    domains that it trains on. Domains that it does not train on, and all domains otherwise, are divided at random.

    Raises:
        DataError: a domain has too few images to hold any out.
    """
    splits = {}
    for d, domain in enumerate(dataset.domains):
        members = dataset.indices(domain)
        if dataset.official_split is not None and test_mode == "target" and dataset.trains_on(domain):
            splits[domain] = _official(dataset, domain, members)
            continue
        if int(len(members) * frac) == 0:
            raise DataError(_too_few(domain, len(members), frac))
        if test_mode == "in-domain":
            train, heldout, test = three_way(len(members), frac, trial=trial, domain_index=d)
        else:
            train, heldout = holdout(len(members), frac, trial=trial, domain_index=d)
            test = np.empty(0, dtype=np.int64)
        splits[domain] = Split(members[train], members[heldout], members[test])
    return DomainSplits(splits)


def training_obstacles(dataset: DomainDataset, *, frac: float = 0.2) -> list[str]:
    """Return one sentence for each reason why a data set cannot be trained on, whatever the configuration.

    Example:
        >>> from qtdog.data.known_datasets import RotatedDigits
        >>> training_obstacles(RotatedDigits())
        []
    """
    found = []
    if len(dataset.classes) < 2:
        only = f"all images have the class '{dataset.classes[0]}'" if dataset.classes else "there is no class"
        found.append(f"{only}: there is nothing to tell apart")
    for domain, n in zip(dataset.domains, dataset.counts().sum(axis=1).tolist(), strict=True):
        if dataset.official_split is None and int(n * frac) == 0:
            found.append(_too_few(domain, n, frac))
    return found


def _too_few(domain: str, n: int, frac: float) -> str:
    needed = int(np.ceil(1 / frac))
    text = f"domain '{domain}' has {n} images: too few to hold out {frac:.0%} for selection; it needs at least {needed}"
    return f"{text}. Add images, or leave the domain out."


def _official(dataset: DomainDataset, domain: str, members: Indices) -> Split:
    assert dataset.official_split is not None
    own = dataset.official_split[members]
    split = Split(*(members[own == part] for part in (TRAIN, ID_VAL, ID_TEST)))
    if len(split.heldout) == 0:
        raise DataError(f"the official division of {dataset.card.name} holds out nothing of domain '{domain}'")
    return split


def holdout(n: int, frac: float, *, trial: int, domain_index: int) -> tuple[Indices, Indices]:
    """Return (train, heldout): a permutation of range(n), the first int(n · frac) of it held out.

    The permutation is that of DomainBed (Gulrajani and Lopez-Paz, 2021): NumPy's legacy generator, seeded with the md5
    of "(trial, domain_index)" modulo 2^31.

    Example:
        >>> train, heldout = holdout(5, 0.2, trial=0, domain_index=0)
        >>> len(train), len(heldout)
        (4, 1)
    """
    order = _shuffled(n, trial, domain_index)
    n_heldout = int(n * frac)
    return order[n_heldout:], order[:n_heldout]


def three_way(n: int, frac: float = 0.2, *, trial: int, domain_index: int) -> tuple[Indices, Indices, Indices]:
    """Return (train, heldout, test): as `holdout`, with the next int(n · frac) of the permutation for the test.

    The validation split is the same as in `holdout`; with the default share this is the paper's 60/20/20 (Table 12).

    Example:
        >>> [len(part) for part in three_way(10, trial=0, domain_index=0)]
        [6, 2, 2]
    """
    order = _shuffled(n, trial, domain_index)
    size = int(n * frac)
    return order[2 * size :], order[:size], order[size : 2 * size]


def split_seed(trial: int, domain_index: int) -> int:
    """Return the seed of one domain's permutation: md5 of the text "(trial, domain_index)" modulo 2^31.

    Example:
        >>> split_seed(0, 0) == split_seed(0, 0) != split_seed(0, 1)
        True
    """
    text = str((trial, domain_index)).encode()
    return int(hashlib.md5(text, usedforsecurity=False).hexdigest(), 16) % 2**31


def _shuffled(n: int, trial: int, domain_index: int) -> Indices:
    order = np.arange(n, dtype=np.int64)
    np.random.RandomState(split_seed(trial, domain_index)).shuffle(order)
    return order


def with_wrong_labels(
    class_index: npt.NDArray[np.integer],
    pools: Mapping[str, npt.NDArray[np.int64]],
    share: float,
    *,
    n_classes: int,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Return the labels, of which in each pool a share is replaced by another class, all others alike likely.

    That is symmetric label noise (Zhang et al., *Understanding deep learning requires rethinking generalization*, ICLR
    2017), but exactly round(share · n) labels of each pool are wrong, and each of them is. The same seed gives nested
    sets: what is wrong at 20 % is wrong in the same way at 40 %.

    Args:
        class_index: class of each image (n,); not changed.
        pools: name, part of the seed, to indices of images.
        share: of wrong labels, 0 to 1.
        n_classes: at least 2.
        seed: of all draws.

    Example:
        >>> labels, pools = np.zeros(10, dtype=np.int64), {"a": np.arange(8)}
        >>> wrong = with_wrong_labels(labels, pools, 0.25, n_classes=3, seed=0)
        >>> int((wrong != labels).sum()), wrong[8:].tolist()
        (2, [0, 0])
    """
    noisy = class_index.astype(np.int64)
    for name, pool in pools.items():
        stream = numpy_stream(seed, "label-noise", name)
        order, shift = stream.permutation(np.sort(pool)), stream.integers(1, n_classes, size=len(pool))
        n_wrong = round(share * len(pool))
        chosen = order[:n_wrong]
        noisy[chosen] = (noisy[chosen] + shift[:n_wrong]) % n_classes
    return noisy
