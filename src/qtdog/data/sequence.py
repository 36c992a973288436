"""Any Python sequence of images (a `torchvision` or Hugging Face data set) as a data set of domains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qtdog.core.errors import DataError
from qtdog.data.cards import DatasetCard
from qtdog.data.dataset import (
    ImageDataset,
    check_domain_names,
    composed,
    is_missing,
    look_alikes,
    sample_arrays,
)
from qtdog.data.decode import DecodeError, to_pixels

MULTI_LABEL = "each image needs one label and one domain; several labels for one image (multi-label) are not supported"


class SequenceDataset(ImageDataset):
    """Images that a function gives, with a label and a domain each.

    Args:
        name: of the data set.
        read: position → the image, as `PIL.Image`, or an array or tensor uint8 (H, W), (H, W, 1) or (H, W, 3). It may
            be called from several threads.
        labels: class of each image; names, or positions in `classes`.
        domains: domain of each image (a site, a camera, a month).
        classes: class names, if the labels are numbers.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        DataError: lengths differ, there is no image, or an image has several labels, none (None, NaN, -1), or one that
            is out of range.

    Example:
        >>> images = [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(4)]
        >>> dataset = SequenceDataset("tiny", images.__getitem__, ["x", "y", "x", "y"], ["a", "a", "b", "b"])
        >>> dataset.domains, dataset.classes, int(dataset.read(3).max())
        (('a', 'b'), ('x', 'y'), 3)
    """

    def __init__(
        self,
        name: str,
        read: Callable[[int], Any],
        labels: Sequence[Any],
        domains: Sequence[Any],
        *,
        classes: Sequence[str] | None = None,
        channels: int = 3,
    ) -> None:
        groups, named = (
            [_name(d, i) for i, d in enumerate(domains)],
            [_name(c, i, classes) for i, c in enumerate(labels)],
        )
        if len(groups) != len(named) or not named:
            raise DataError(f"{name} has {len(named)} labels and {len(groups)} domains; {MULTI_LABEL}")
        self.card = DatasetCard(name=name, title=f"Images of {name}", channels=channels)
        self.domains, self.classes = tuple(sorted(set(groups))), tuple(sorted(set(named)))
        check_domain_names(name, self.domains)
        self.notes = [*look_alikes("domains", self.domains), *look_alikes("classes", self.classes)]
        self._order = sorted(range(len(named)), key=lambda i: (groups[i], named[i], i))
        pairs = [(groups[i], named[i]) for i in self._order]
        self.keys = [f"{d}/{c}/{i:07d}" for (d, c), i in zip(pairs, self._order, strict=True)]
        self.domain_index, self.class_index = sample_arrays(self.domains, self.classes, pairs)
        self._read = read

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return image i, uint8 (H, W, C) (DataError if the function gives none)."""
        try:
            given = self._read(self._order[i])
            image = given if isinstance(given, Image.Image) else Image.fromarray(_flat(np.asarray(given)))
            return to_pixels(image, self.card.channels)
        except Exception as error:  # a stranger's function raises what it likes
            of_machine = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
            kind = DataError if of_machine else DecodeError
            raise kind(f"image {self._order[i]} of {self.card.name} cannot be had: {error}") from error

    def sample_signature(self, i: int) -> str:
        """Return the sha256 of the pixels of image i: nothing cheaper is known of it."""
        return self.sample_sha256(i)

    def sample_change_ns(self, i: int) -> int:
        """Return 0: these images are taken not to change while they are in use."""
        return 0

    def sample_sha256(self, i: int) -> str:
        """Return the sha256 of size and pixels of image i (DataError if it cannot be had)."""
        pixels = self.read(i)
        return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _name(value: Any, position: int, names: Sequence[str] | None = None) -> str:
    if isinstance(value, (list, tuple, set, dict)) or getattr(value, "ndim", 0):
        raise DataError(MULTI_LABEL)
    value = value.item() if hasattr(value, "item") else value  # a number of NumPy or torch
    if names is not None and isinstance(value, int):
        if not 0 <= value < len(names):
            raise DataError(f"the label of image {position} is {value}; there are {len(names)} classes, from 0")
        value = names[value]
    text = composed(str(value).strip())
    if is_missing(text) or value is None:
        raise DataError(f"image {position} has the label or domain {value!r}, which means that there is none")
    return text


def _flat(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(f"an image must be uint8 (H, W) or (H, W, C), found {array.dtype} {array.shape}")
    return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
