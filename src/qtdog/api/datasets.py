"""`qtdog.Dataset`: images that are Python objects already, with a label and a domain each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from qtdog.core.errors import DataError, unknown
from qtdog.data.sequence import SequenceDataset

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
