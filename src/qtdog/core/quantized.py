"""The one value that training, files, analysis and size accounting share: integer codes with their step sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qtdog.core.config import MAX_BITS as MAX_BITS
from qtdog.core.config import MIN_BITS as MIN_BITS

LEVELS = ("uniform", "symmetric", "half", "power_of_two")


def scale_shape(ndim: int, axis: int | None) -> tuple[int, ...]:
    """Return the shape that lets a scale of one entry per index of `axis` broadcast over `ndim` dimensions.

    Example:
        >>> scale_shape(4, 0), scale_shape(4, None)
        ((-1, 1, 1, 1), (1, 1, 1, 1))
    """
    return tuple(-1 if dim == axis else 1 for dim in range(ndim))


@dataclass(frozen=True)
class QuantSpec:
    """The grid that a weight lives on: points of a unit grid, one per integer code, times a step size.

    With b bits, the codes and the points that they stand for are:

    | levels | codes c | point of c |
    | --- | --- | --- |
    | uniform | -2^(b-1) … 2^(b-1) - 1 (paper Eq. 1) | c |
    | symmetric | -(2^(b-1) - 1) … 2^(b-1) - 1 | c |
    | half | -2^(b-1) … 2^(b-1) - 1 | c + 1/2: no zero (DoReFa) |
    | power_of_two | -K … K, K = 2^(b-2) | sign(c) · 2^(abs(c) - K), 0 for c = 0 (INQ) |

    Attributes:
        bits: 2 to 8.
        axis: the dimension that has one step size per index (0 for an output channel), or None for one per tensor.
        levels: the kind of grid, a name of `LEVELS`.
        groups: equal blocks of dimension 0, each with step sizes of its own along `axis`. More than 1 only for grouped
            transposed convolutions, whose weight is (in, out / groups, …): output channel g · out / groups + o has the
            step size of that number.

    Raises:
        ValueError: bits outside 2 … 8, unknown levels, or groups without an axis other than 0.

    Example:
        >>> QuantSpec(3).points().tolist()
        [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
        >>> QuantSpec(3, levels="power_of_two").points().tolist()
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """

    bits: int
    axis: int | None = 0
    levels: str = "uniform"
    groups: int = 1

    def __post_init__(self) -> None:
        """Check the bits and the levels."""
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be {MIN_BITS} to {MAX_BITS}, not {self.bits}")
        if self.levels not in LEVELS:
            raise ValueError(f"levels must be one of {', '.join(LEVELS)}, not '{self.levels}'")
        if self.groups != 1 and (self.groups < 1 or self.axis in (None, 0)):
            raise ValueError(f"{self.groups} groups of dimension 0 need an axis other than 0, not {self.axis}")

    def n_scales(self, shape: Sequence[int]) -> int:
        """Return how many step sizes a weight of this shape has."""
        return 1 if self.axis is None else self.groups * shape[self.axis]

    def spread(self, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """Return step sizes (n,) in a shape that broadcasts to a weight of `shape`; differentiable.

        Example:
            >>> QuantSpec(4, axis=1, groups=2).spread(torch.arange(4.0), (4, 2)).tolist()
            [[0.0, 1.0], [0.0, 1.0], [2.0, 3.0], [2.0, 3.0]]
        """
        if self.groups == 1:
            return scale.reshape(scale_shape(len(shape), self.axis))
        grouped = scale.reshape(self.groups, 1, *scale_shape(len(shape), self.axis)[1:])
        return grouped.expand(-1, shape[0] // self.groups, *grouped.shape[2:]).flatten(0, 1)

    def rows(self, weight: Tensor) -> Tensor:
        """Return the weights that share a step size as rows, shape (n, k); a view where the memory format allows.

        Example:
            >>> QuantSpec(4, axis=1).rows(torch.zeros(2, 3, 4)).shape
            torch.Size([3, 8])
        """
        if self.axis is None:
            return weight.reshape(1, -1)
        if self.groups == 1:
            return weight.movedim(self.axis, 0).flatten(1)
        return weight.unflatten(0, (self.groups, -1)).movedim(self.axis + 1, 1).flatten(2).flatten(0, 1)

    @cached_property
    def qmin(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.levels in ("uniform", "half") else -self.qmax

    @cached_property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 2) if self.levels == "power_of_two" else 2 ** (self.bits - 1) - 1

    def points(self, device: torch.device | None = None) -> Tensor:
        """Return the points of the unit grid, float32, in the order of their codes from `qmin` to `qmax`."""
        codes = torch.arange(self.qmin, self.qmax + 1, dtype=torch.float32, device=device)
        if self.levels == "half":
            return codes + 0.5
        if self.levels == "power_of_two":
            return codes.sign() * torch.exp2(codes.abs() - self.qmax)
        return codes


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes and step sizes of one weight.

    Attributes:
        codes: int8, the shape of the weight, each in [spec.qmin, spec.qmax].
        scale: float32 step sizes, shape (spec.n_scales(codes.shape),): one per index of spec.axis, or a single one.
        spec: the grid.

    Example:
        >>> q = QuantizedTensor(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([0.5]), QuantSpec(3))
        >>> q.dequantize()
        tensor([[ 0.5000, -1.0000]])
    """

    codes: Tensor
    scale: Tensor
    spec: QuantSpec

    def dequantize(self) -> Tensor:
        """Return point · scale as float32, the very weights that the forward pass of training used."""
        if self.spec.levels in ("uniform", "symmetric"):
            points = self.codes.to(torch.float32)
        else:
            table = self.spec.points(self.codes.device)
            points = torch.empty_like(self.codes, dtype=torch.float32)  # keeps the memory format, as `to` does
            points.copy_(table[self.codes.long() - self.spec.qmin])
        return points * self.spec.spread(self.scale, self.codes.shape)
