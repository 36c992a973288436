"""Some images of a data set, as if the others did not exist."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qtdog.data.dataset import DomainDataset
from qtdog.data.sheet import Datasheet


class PickedImages(DomainDataset):
    """Images of another data set, in the same order; nothing asks for the others.

    Content, signature and decoded cache are those of the picked images alone. The classes are those of the whole, so
    that labels mean the same.

    Args:
        dataset: the whole.
        places: positions of the picked images, ascending.
        kept: positions of the domains that remain, ascending; those of all picked images are among them.
        sheet: the datasheet of the picked images.
    """

    def __init__(
        self, dataset: DomainDataset, places: npt.NDArray[np.int64], kept: list[int], sheet: Datasheet
    ) -> None:
        self.sheet = sheet
        self.domains = tuple(dataset.domains[d] for d in kept)
        self.classes = dataset.classes
        self.keys = [dataset.keys[place] for place in places]
        self.domain_index = np.searchsorted(kept, dataset.domain_index[places]).astype(np.int16)
        self.class_index = dataset.class_index[places]
        self.parts = None if dataset.parts is None else dataset.parts[places]
        self.skipped = dataset.skipped
        self._dataset = dataset
        self._places = places.tolist()

    def read(self, i: int) -> npt.NDArray[np.uint8]:
        """Return picked image i at its native size, uint8 (H, W, C) (DataError if it cannot be read)."""
        return self._dataset.read(self._places[i])

    def read_resized(self, i: int, size: int) -> npt.NDArray[np.uint8]:
        """Return picked image i as uint8 (size, size, C) (DataError if it cannot be read)."""
        return self._dataset.read_resized(self._places[i], size)

    def files(self) -> tuple[str, list[str]] | None:
        """Return the whole data set's folder and the files of the picked images, or None if images are no files."""
        whole = self._dataset.files()
        return None if whole is None else (whole[0], [whole[1][place] for place in self._places])

    def sample_signature(self, i: int) -> str:
        """Return the whole data set's fingerprint of picked image i."""
        return self._dataset.sample_signature(self._places[i])

    def sample_change_ns(self, i: int) -> int:
        """Return when picked image i was changed last."""
        return self._dataset.sample_change_ns(self._places[i])

    def sample_sha256(self, i: int) -> str:
        """Return the hex sha256 of the stored content of picked image i (DataError if it cannot be had)."""
        return self._dataset.sample_sha256(self._places[i])
