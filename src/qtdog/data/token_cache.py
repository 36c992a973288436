"""Tokenise once: all texts of a data set as numbers in one file, which training reads rows of."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtdog.core.errors import DataError
from qtdog.core.files import atomic_folder
from qtdog.core.progress import Progress
from qtdog.data.buffers import BufferPool
from qtdog.data.cache import DecodedCache, cache_root
from qtdog.data.text_domains import TextDomains

TOKENS = "tokens.u16"
N_TOGETHER = 1024
N_BYTES = 2
Tokenise = Callable[[Sequence[str]], npt.NDArray[np.integer]]


class TokenCache(DecodedCache):
    """n texts of one length in one file.

    Args:
        path: a file of n · length unsigned 16-bit numbers, little-endian.
        n: texts.
        length: tokens of each.
    """

    def __init__(self, path: Path, n: int, length: int) -> None:
        super().__init__(path, (n, length, 1, N_BYTES))

    def gather(self, indices: npt.NDArray[np.integer] | Sequence[int], pool: BufferPool | None = None) -> Tensor:
        """Return the token numbers of the texts at `indices`, int64 (b, length); errors as in `DecodedCache.gather`."""
        numbers = super().gather(indices, pool).numpy().view("<u2").reshape(len(indices), self.shape[1])
        return torch.from_numpy(numbers.astype(np.int64))


def open_tokens(
    dataset: TextDomains,
    tokenise: Tokenise,
    *,
    name: str,
    length: int,
    progress: Progress = None,
    folder: Path | None = None,
) -> TokenCache:
    """Return the data set's texts as numbers, tokenising them now unless that was done before.

    Args:
        dataset: the texts.
        tokenise: texts → numbers (n, length), 0 behind the end.
        name: of the tokeniser; with the content and the length it is the key.
        length: tokens of each text.
        progress: of tokenising.
        folder: of the caches; default `cache_root()`.

    Raises:
        DataError: the tokeniser gives numbers that do not fit 16 bits, or rows of another length.
        RunError: the cache folder cannot be written.
    """
    folder = folder or cache_root()
    key = hashlib.sha256(json.dumps([dataset.content_sha256(), name, length]).encode()).hexdigest()
    place = folder / "tokens" / key[:24]
    file = place / TOKENS
    if not file.is_file() or file.stat().st_size != N_BYTES * length * len(dataset):
        shutil.rmtree(place, ignore_errors=True)
        with atomic_folder(place) as temporary, (temporary / TOKENS).open("wb") as stream:
            for tokens in _portions(dataset, tokenise, progress):
                stream.write(_checked(tokens, length).astype("<u2").tobytes())
    return TokenCache(file, len(dataset), length)


def _portions(dataset: TextDomains, tokenise: Tokenise, progress: Progress) -> Iterator[npt.NDArray[np.integer]]:
    for start in range(0, len(dataset), N_TOGETHER):
        end = min(len(dataset), start + N_TOGETHER)
        yield tokenise(dataset.texts(np.arange(start, end)))
        if progress is not None:
            progress(end, len(dataset))


def _checked(tokens: npt.NDArray[np.integer], length: int) -> npt.NDArray[np.integer]:
    if tokens.ndim != 2 or tokens.shape[1] != length or tokens.min() < 0 or tokens.max() >= 1 << (8 * N_BYTES):
        found = f"numbers {tokens.min()} … {tokens.max()} of shape {tokens.shape}"
        raise DataError(f"the tokeniser gave {found}, not 16 bits in rows of {length}")
    return tokens
