"""From float weights to integer codes, as a pure function."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qtdog.core.quantized import QuantizedTensor, QuantSpec, scale_shape


def ranged(spec: QuantSpec, range: str) -> QuantSpec:
    """Return `spec` with the integer levels of a `range`: all codes ("asymmetric") or without the lowest ("symmetric").

    Example:
        >>> ranged(QuantSpec(4), "symmetric").qmin
        -7
    """
    return replace(spec, levels="symmetric" if range == "symmetric" else "uniform")


def encode(weight: Tensor, scale: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Return the codes of the points of the grid of `scale` that are nearest to `weight` (QT-DoG, Eq. 1-2).

    codes = clamp(round(weight / scale), spec.qmin, spec.qmax), round half to even, for uniform and symmetric levels;
    clamp(floor(weight / scale), spec.qmin, spec.qmax) for half levels, whose points are codes + 1/2.

    Args:
        weight: float weights of any shape; computed in float32.
        scale: float32 step sizes, shape (weight.shape[spec.axis],), or (1,) if spec.axis is None; all positive.
        spec: bits, axis and levels, not "power_of_two".

    Returns:
        The codes (int8, the shape and memory format of the weight) with a copy of the step sizes.

    Raises:
        ValueError: levels are powers of two, which are no multiples of a step.
        RuntimeError: the shape of `scale` does not fit that of `weight`.

    Example:
        >>> encode(torch.tensor([[0.9, -7.0]]), torch.tensor([0.5]), QuantSpec(3)).codes
        tensor([[ 2, -4]], dtype=torch.int8)
        >>> encode(torch.tensor([[0.9, -7.0]]), torch.tensor([0.5]), QuantSpec(3, levels="half")).codes
        tensor([[ 1, -4]], dtype=torch.int8)
    """
    if spec.levels == "power_of_two":
        raise ValueError("powers of two are no multiples of a step size; the quantizer that has them encodes them")
    scale = scale.detach().to(torch.float32, copy=True)
    codes = weight.detach().to(torch.float32) / scale.reshape(scale_shape(weight.ndim, spec.axis))
    codes = codes.floor_() if spec.levels == "half" else codes.round_()
    return QuantizedTensor(codes.clamp_(spec.qmin, spec.qmax).to(torch.int8), scale, spec)
