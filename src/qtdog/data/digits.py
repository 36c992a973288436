"""The embedded data set: 1,797 handwritten digits, each rotated by one of six angles."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qtdog.core.random import numpy_stream
from qtdog.data.cards import ROTATED_DIGITS
from qtdog.data.dataset import DomainDataset, sample_arrays

SIZE = 28


class RotatedDigits(DomainDataset):
    """scikit-learn's digits, upsampled to 28 x 28 and rotated counter-clockwise by 0, 15, …, 75 degrees.

    Each image is in exactly one domain. The assignment is a fixed random one that spreads every class evenly.

    Example:
        >>> digits = RotatedDigits()
        >>> len(digits), digits.read(0).shape
        (1797, (28, 28, 1))
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # takes a second to import; only this data set needs it

        bunch: Any = load_digits()
        labels = np.asarray(bunch["target"])
        angles = assign_domains(labels)
        self.sheet = ROTATED_DIGITS
        self.domains = ROTATED_DIGITS.domains or ()
        self.classes = ROTATED_DIGITS.classes or ()
        order = np.lexsort((np.arange(len(labels)), labels, angles))
        names = [(self.domains[angles[i]], self.classes[labels[i]]) for i in order]
        self.keys = [f"{domain}/{label}/{i:04d}" for (domain, label), i in zip(names, order, strict=True)]
        self.domain_index, self.class_index = sample_arrays(self.domains, self.classes, names)
        scans = np.asarray(bunch["images"])[order]
        degrees = [int(domain) for domain, _ in names]
        self._images = np.stack([_render(scan, angle) for scan, angle in zip(scans, degrees, strict=True)])

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i, uint8 (28, 28, 1)."""
        return self._images[i]

    def sample_signature(self, i: int) -> str:
        """Return the sha256 of the pixels of image i (they are in memory: nothing cheaper is needed)."""
        return self.sample_sha256(i)

    def sample_change_ns(self, i: int) -> int:
        """Return 0: these images cannot change while they are in use."""
        return 0

    def sample_sha256(self, i: int) -> str:
        """Return the sha256 of the pixels of image i."""
        return hashlib.sha256(self._images[i].tobytes()).hexdigest()


def assign_domains(labels: npt.NDArray[np.integer], n_domains: int = 6) -> npt.NDArray[np.int64]:
    """Return a domain per image (n,), fixed and random, with each class spread evenly.

    The images of each class are shuffled, and all are then dealt to the domains in turn.

    Example:
        >>> np.bincount(assign_domains(np.zeros(12, dtype=np.int64))).tolist()
        [2, 2, 2, 2, 2, 2]
    """
    rng = numpy_stream(0, "rotated-digits")
    dealt = np.concatenate([rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    domains = np.empty(len(labels), dtype=np.int64)
    domains[dealt] = np.arange(len(labels)) % n_domains
    return domains


def _render(scan: npt.NDArray[np.floating], angle: int) -> npt.NDArray[np.uint8]:
    eight_bit = np.rint(scan * (255 / 16)).astype(np.uint8)  # scikit-learn stores grey values 0 … 16
    large = Image.fromarray(eight_bit).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(large.rotate(angle, Image.Resampling.BILINEAR))[:, :, None]
