"""A weight as integers inside a graph, after batch norm was folded into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qtdog.core.quantized import QuantizedTensor

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]

SAFE = 64
"""Largest absolute code for which pairs of products never saturate 16 bits: 2 · 255 · 64 = 32,640 ≤ 32,767. Processors
without VNNI add unsigned activations times signed weights in such pairs (VPMADDUBSW)."""
# rounding of one multiplication in float32, with room
CLOSE = 1e-6


@dataclass(frozen=True)
class IntegerWeight:
    """w = point(code) · scale along one axis.

    Attributes:
        codes: int8, in the shape that the graph has.
        points: the points of the unit grid, float32, that of code c at c - qmin; None where the point is the code.
        qmin: smallest code of the grid.
        scale: one factor per index of `axis`; negative where batch norm turned the sign.
        axis: of the output channels.
    """

    codes: Codes
    points: Floats | None
    qmin: int
    scale: Floats
    axis: int

    @property
    def unit(self) -> Floats:
        """The weight without its scale."""
        if self.points is None:
            return self.codes.astype(np.float32)
        return self.points[self.codes.astype(np.int64) - self.qmin]

    @property
    def spread_scale(self) -> Floats:
        """The scale in a shape that broadcasts over the codes."""
        return self.scale.reshape([-1 if dim == self.axis else 1 for dim in range(self.codes.ndim)])

    def dequantize(self) -> Floats:
        """Return the weight in float32."""
        return self.unit * self.spread_scale


def fit(weight: Floats, value: QuantizedTensor) -> IntegerWeight | None:
    """Return the integers behind a weight of a graph, or None if it is not `value` up to a factor per output channel.

    Folding batch norm into a convolution multiplies each output channel by γ/√(σ² + ε): the codes stay, only the step
    sizes change. The factor is read off the largest entry of each channel, and every other entry must agree with it.

    Args:
        weight: as the graph has it, (n_out, …), or (n_in, n_out) for a transposed matrix.
        value: the frozen codes.

    Example:
        >>> import torch
        >>> from qtdog.core.quantized import QuantSpec
        >>> value = QuantizedTensor(torch.tensor([[1, -3]], dtype=torch.int8), torch.tensor([0.5]), QuantSpec(3))
        >>> found = fit(np.array([[-1.0, 3.0]], dtype=np.float32), value)  # folding multiplied the channel by -2
        >>> found.codes.tolist(), found.scale.tolist()
        ([[1, -3]], [-1.0])
        >>> fit(np.array([[1.0, 1.0]], dtype=np.float32), value) is None
        True
    """
    codes = value.codes.contiguous().numpy()
    for array, axis in ((codes, 0), (codes.T, 1)):
        if array.shape == weight.shape and (axis == 0 or array.ndim == 2):
            found = _fit(weight, np.ascontiguousarray(array), value, axis)
            if found is not None:
                return found
    return None


def _fit(weight: Floats, codes: Codes, value: QuantizedTensor, axis: int) -> IntegerWeight | None:
    spec = value.spec
    plain = spec.levels in ("uniform", "symmetric")
    points = None if plain else spec.points().numpy()
    bare = IntegerWeight(codes, points, spec.qmin, np.ones(codes.shape[axis], dtype=np.float32), axis)
    units = np.moveaxis(bare.unit, axis, 0).reshape(codes.shape[axis], -1)
    rows = np.moveaxis(weight, axis, 0).reshape(codes.shape[axis], -1)
    largest = np.abs(units).argmax(1)[:, None]
    tops = np.take_along_axis(units, largest, 1)[:, 0]
    scale = np.take_along_axis(rows, largest, 1)[:, 0] / np.where(tops == 0, 1, tops)
    error = np.abs(units * scale[:, None] - rows).max(1)
    if (error > CLOSE * np.abs(rows).max(1)).any():
        return None
    return IntegerWeight(codes, points, spec.qmin, scale.astype(np.float32), axis)


def seven_bits(weight: IntegerWeight) -> tuple[Codes, Floats, bool]:
    """Return the weight as codes in [-64, 64] with positive scales, and whether that is exact.

    Codes of 7 bits and less stay as they are, but for the sign of channels that batch norm turned (so -64 may become
    64). Half steps become odd codes of half the step, powers of two become integers, where these fit; every other
    weight is rounded to the nearest of 127 levels of its channel's range.

    Example:
        >>> codes = np.array([[1, -64], [2, 3]], dtype=np.int8)
        >>> weight = IntegerWeight(codes, None, -64, np.array([0.5, -0.5], dtype=np.float32), 0)
        >>> seven_bits(weight)[0].tolist(), seven_bits(weight)[2]
        ([[1, -64], [-2, -3]], True)
    """
    unit = weight.unit
    smallest = 1.0 if weight.points is None else float(np.abs(weight.points[weight.points != 0]).min())
    whole = unit / smallest
    sign = np.sign(weight.spread_scale)
    if np.abs(whole).max() <= SAFE and (whole == np.round(whole)).all():
        return (whole * sign).astype(np.int8), _positive(np.abs(weight.scale) * np.float32(smallest)), True
    again = refit(weight.dequantize(), weight.axis)
    return again.codes, again.scale, False


def refit(weight: Floats, axis: int = 0) -> IntegerWeight:
    """Return the nearest of 127 levels of each output channel's range, for a weight that no grid of codes explains.

    Example:
        >>> found = refit(np.array([[1.0, -0.25]], dtype=np.float32))
        >>> found.codes.tolist()
        [[63, -16]]
    """
    others = tuple(dim for dim in range(weight.ndim) if dim != axis)
    scale = _positive(np.abs(weight).max(others) / np.float32(SAFE - 1))
    spread = scale.reshape([-1 if dim == axis else 1 for dim in range(weight.ndim)])
    return IntegerWeight(np.round(weight / spread).astype(np.int8), None, -SAFE, scale, axis)


def _positive(scale: Floats) -> Floats:
    """Return scales with 1 for those of channels that are all zero."""
    return np.where(scale > 0, scale, 1).astype(np.float32)
