"""What a network reads, prepared once: rows of one file, with images and tokens as the two kinds."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qtdog.core.errors import DataError
from qtdog.core.files import lock_file
from qtdog.data.augment import BufferPool

Indices = npt.NDArray[np.integer] | Sequence[int]


class InputCache(ABC):
    """n inputs of equal size in one file, read by position; safe to use from several threads.

    Args:
        path: a file of n · row_bytes bytes.
        n: inputs.
        row_bytes: bytes of each.
    """

    def __init__(self, path: Path, n: int, row_bytes: int) -> None:
        self.path = path
        self._n = n
        self._row_bytes = row_bytes
        self._handle = os.open(path, os.O_RDONLY)
        keep_from_removal(self._handle)
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        """Return the number of inputs n."""
        return self._n

    @abstractmethod
    def gather(self, indices: Indices, pool: BufferPool | None = None) -> Tensor:
        """Return the stored inputs at `indices`, in that order.

        Args:
            indices: positions, each in [0, n).
            pool: where the memory comes from; default: fresh memory.

        Raises:
            IndexError: an index is out of range.
            DataError: the file was cut short meanwhile.
        """

    @abstractmethod
    def network_inputs(self, indices: Indices, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Return the inputs at `indices` as a network takes them in evaluation; errors as in `gather`.

        Args:
            indices: positions, each in [0, n).
            mean: per channel, of images in [0, 1].
            std: likewise.
        """

    def _read_rows(self, indices: Indices, rows: npt.NDArray[np.uint8]) -> None:
        """Read the rows at `indices` into uint8 (b, row_bytes)."""
        for row, index in zip(rows, np.asarray(indices).tolist(), strict=True):
            if not 0 <= index < self._n:
                raise IndexError(f"input {index} of {self._n}")
            if os.preadv(self._handle, [row.data], index * self._row_bytes) != self._row_bytes:
                raise DataError(f"the cache {self.path} was cut short; start again and it is rebuilt")


def keep_from_removal(handle: int) -> None:
    """Keep an open file of a cache from being removed as long as it is open, where the file system has locks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as stream:
        ...     keep_from_removal(stream.fileno())
    """
    try:
        lock_file(handle, shared=True)
    except OSError:
        return


def cache_root() -> Path:
    """Return where caches live: $QTDOG_CACHE, else $XDG_CACHE_HOME/qtdog, else ~/.cache/qtdog."""
    own = os.environ.get("QTDOG_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qtdog"
