"""The one value that training, files, analysis and size accounting share: integer codes with their step sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BITS = 2
MAX_BITS = 8


def scale_shape(ndim: int, axis: int | None) -> tuple[int, ...]:
    """Return the shape that lets a scale of one entry per index of `axis` broadcast over `ndim` dimensions.

    Example:
        >>> scale_shape(4, 0), scale_shape(4, None)
        ((-1, 1, 1, 1), (1, 1, 1, 1))
    """
    return tuple(-1 if dim == axis else 1 for dim in range(ndim))


@dataclass(frozen=True)
class QuantSpec:
    """The grid that a weight lives on: signed `bits`-bit integers times a step size.

    Attributes:
        bits: 2 to 8.
        axis: the dimension that has one step size per index (0 for an output channel), or None for one per tensor.

    Raises:
        ValueError: bits outside 2 … 8.
    """

    bits: int
    axis: int | None = 0

    def __post_init__(self) -> None:
        """Check the bits."""
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be {MIN_BITS} to {MAX_BITS}, not {self.bits}")

    @property
    def qmin(self) -> int:
        """Smallest code, -2^(bits-1) (paper Eq. 1: -Q_N)."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code, 2^(bits-1) - 1 (paper Eq. 1: Q_P)."""
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes and step sizes of one weight.

    Attributes:
        codes: int8, the shape of the weight, each in [spec.qmin, spec.qmax].
        scale: float32 step sizes, one per index of spec.axis, shape (n,); or (1,) if spec.axis is None.
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
        """Return codes · scale as float32, the very weights that the forward pass of training used."""
        shape = scale_shape(self.codes.ndim, self.spec.axis)
        return self.codes.to(torch.float32) * self.scale.reshape(shape)
