"""`qtdog.Dataset`: images that are Python objects already, with a label and a domain each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from qtdog.core.errors import DataError, unknown
from qtdog.data.cards import DatasetCard
from qtdog.data.dataset import ImageDataset, check_domain_names, composed, is_missing, look_alikes, sample_arrays
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
        self.domain_index, self.class_index = sample_arrays(
            self.domains, self.classes, [d for d, _ in pairs], [c for _, c in pairs]
        )
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


Samples = Any  # a sequence of (image, label), of images, or of dictionaries (a Hugging Face data set)


class Dataset(SequenceDataset):
    """Any sequence of images as a data set of domains: a list, a torchvision data set, one of Hugging Face.

    A model that is trained on it records the name and the content's hash; another process cannot open it by its name.

    Args:
        samples: (image, label) pairs as torchvision has them; or images alone, with `labels`; or dictionaries with the
            keys `image` and `label`; or a mapping from domains to such sequences. An image is a `PIL.Image`, or an
            array or tensor uint8 (H, W), (H, W, 1) or (H, W, 3).
        domains: the domain of each image (a site, a camera, a month), or the key that holds it in dictionaries.
        labels: the class of each image, or the key; default: the second of each pair, or "label".
        classes: class names, where labels are numbers. Default: those that the samples know (`samples.classes`).
        name: of the data set, in results and reports.
        channels: 3 (RGB) or 1 (grey). Default: those of the first image.

    Raises:
        DataError: lengths differ, there is no image, an image has several labels, or a key is missing.

    Example:
        >>> import numpy as np
        >>> images = [np.full((8, 8), i, dtype=np.uint8) for i in range(4)]
        >>> data = Dataset(images, domains=["a", "a", "b", "b"], labels=["x", "y", "x", "y"], name="tiny")
        >>> data.domains, data.classes, data.card.channels
        (('a', 'b'), ('x', 'y'), 1)
    """

    def __init__(
        self,
        samples: Samples,
        domains: Sequence[Any] | str | None = None,
        *,
        labels: Sequence[Any] | str | None = None,
        classes: Sequence[str] | None = None,
        name: str = "python",
        channels: int | None = None,
    ) -> None:
        if isinstance(samples, Mapping):
            parts = [(str(domain), _Part(part, labels)) for domain, part in samples.items()]
            groups: list[Any] = [domain for domain, part in parts for _ in range(len(part))]
            parts_only = [part for _, part in parts]
        else:
            part = _Part(samples, labels)
            groups = part.column(domains) if isinstance(domains, str) else list(domains or ())
            parts_only = [part]
        if not any(len(part) for part in parts_only):
            raise DataError(f"{name} has no image")
        places = [(part, i) for part in parts_only for i in range(len(part))]
        found = [label for part in parts_only for label in part.labels]
        names = classes or next((part.classes for part in parts_only if part.classes), None)

        def read(i: int) -> Any:
            part, k = places[i]
            return part.image(k)

        super().__init__(name, read, found, groups, classes=names, channels=channels or _channels(read))


class _Part:
    """One sequence of samples."""

    def __init__(self, samples: Samples, labels: Sequence[Any] | str | None) -> None:
        self._samples = samples
        first = samples[0] if len(samples) else None
        self._is_table = isinstance(first, Mapping)
        self._is_pairs = isinstance(first, (tuple, list)) and len(first) == 2
        if isinstance(labels, str) or (labels is None and self._is_table):
            self.labels = self.column(labels or "label")
        elif labels is not None:
            self.labels = list(labels)
        else:
            self.labels = self._own_labels()
        self.classes = self._own_classes(labels if isinstance(labels, str) else "label")

    def __len__(self) -> int:
        return len(self._samples)

    def image(self, i: int) -> Any:
        """Return image i as the sequence has it."""
        sample = self._samples[i]
        if self._is_table:
            return sample["image"]
        return sample[0] if self._is_pairs else sample

    def column(self, key: str) -> list[Any]:
        """Return the values of a key of dictionaries."""
        if not self._is_table:
            raise DataError(f"'{key}' would be a key of dictionaries, and these samples are none: give a list instead")
        names = getattr(self._samples, "column_names", None)
        known = list(names) if names is not None else list(self._samples[0])
        if key not in known:
            raise DataError(unknown("key of the samples", key, known))
        if names is not None:  # of Hugging Face: without decoding an image
            return list(self._samples[key])
        return [sample[key] for sample in self._samples]

    def _own_labels(self) -> list[Any]:
        for name in ("targets", "labels", "_labels"):  # of torchvision: without decoding an image
            found = getattr(self._samples, name, None)
            if found is not None and len(found) == len(self._samples):
                return [value.item() if hasattr(value, "item") else value for value in found]
        if not self._is_pairs:
            raise DataError("these samples are images without labels: give labels=")
        return [self._samples[i][1] for i in range(len(self._samples))]

    def _own_classes(self, key: str) -> Sequence[str] | None:
        features = getattr(self._samples, "features", None)
        names = getattr(features[key], "names", None) if isinstance(features, Mapping) and key in features else None
        return names or getattr(self._samples, "classes", None)


def _channels(read: Callable[[int], Any]) -> int:
    first = read(0)
    if isinstance(first, Image.Image):
        return 1 if first.mode in ("1", "L", "I;16") else 3
    shape = getattr(first, "shape", ())
    return 1 if len(shape) == 2 or (len(shape) == 3 and shape[2] == 1) else 3
