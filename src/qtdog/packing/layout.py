"""The description inside a packed file: which tensors are codes, on which grid, stored how, under which names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qtdog.core.quantized import QuantSpec
from qtdog.packing.codecs import BITS
from qtdog.packing.header import MAX_HEADER_BYTES, TensorInfo

PLAIN_VERSION = 2  # every tensor plain, codes bit-packed; float models are written so
CODED_VERSION = 3  # codes and values entropy-coded
READABLE = (1, 2, 3)  # version 1 had no levels: all its grids are uniform
KEY = "qtdog"
DESCRIPTION = "description"


@dataclass(frozen=True)
class Entry:
    """The grid and the shape of one quantized weight, and how its codes are stored."""

    spec: QuantSpec
    shape: tuple[int, ...]
    codec: str = BITS

    @property
    def n_codes(self) -> int:
        """Codes of the weight."""
        return math.prod(self.shape)

    @property
    def scale(self) -> TensorInfo:
        """Its step sizes: one, or one per index of the axis."""
        return TensorInfo("F32", (1 if self.spec.axis is None else self.shape[self.spec.axis],))


@dataclass(frozen=True)
class Layout:
    """The whole description.

    Attributes:
        quantized: weight name to its grid, shape and codec.
        rest: type and shape of every other tensor that is stored.
        aliases: further names of stored tensors (tied weights), each with the name it is stored under.
        metadata: the caller's.
        pools: how the values of each type are stored that lie together; empty where every tensor lies by itself.
    """

    quantized: dict[str, Entry]
    rest: dict[str, TensorInfo]
    aliases: dict[str, str]
    metadata: dict[str, Any]
    pools: dict[str, str]


def may_describe(n_bytes: int, n_stored: int) -> bool:
    """Return whether a description of `n_bytes` may lie in a frame of `n_stored`: parsed it takes 20 times its length.

    Example:
        >>> may_describe(2**20, 100), may_describe(2**21, 100), may_describe(2**21, 2**13), may_describe(2**25, 2**24)
        (True, False, True, False)
    """
    return n_bytes <= min(MAX_HEADER_BYTES, max(2**20, 256 * n_stored))


def stored_names(name: str) -> tuple[str, str]:
    """Return the names in a file of a quantized weight's codes and, where every tensor lies by itself, its scale."""
    return f"{name}.codes", f"{name}.scale"


def pool_name(dtype: str) -> str:
    """Return the name in a file of all values of one type.

    Example:
        >>> pool_name("F32")
        'values.F32'
    """
    return f"values.{dtype}"


def pooled(quantized: Mapping[str, TensorInfo], rest: Mapping[str, TensorInfo]) -> dict[str, list[TensorInfo]]:
    """Return what lies in the pool of each type, in order: step sizes of the weights, then the rest, each by name.

    Args:
        quantized: the step sizes of each quantized weight.
        rest: every other tensor that is stored.

    Example:
        >>> pooled({}, {"b": TensorInfo("F32", (2,)), "a": TensorInfo("F32", (3,))})
        {'F32': [TensorInfo(dtype='F32', shape=(3,)), TensorInfo(dtype='F32', shape=(2,))]}
    """
    found: dict[str, list[TensorInfo]] = {}
    for info in [*_by_name(quantized), *_by_name(rest)]:
        found.setdefault(info.dtype, []).append(info)
    return found


def _by_name(infos: Mapping[str, TensorInfo]) -> Iterable[TensorInfo]:
    return (infos[name] for name in sorted(infos))
