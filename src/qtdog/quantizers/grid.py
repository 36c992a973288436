"""From float weights to integer codes, as a pure function."""

from __future__ import annotations

import torch
from torch import Tensor

from qtdog.core.quantized import QuantizedTensor, QuantSpec, scale_shape


def encode(weight: Tensor, scale: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Return the codes of `weight` on the grid of `scale` (QT-DoG, Eq. 1-2; round half to even).

    codes = clamp(round(weight / scale), spec.qmin, spec.qmax)

    Args:
        weight: float weights of any shape; computed in float32.
        scale: float32 step sizes, shape (weight.shape[spec.axis],), or (1,) if spec.axis is None; all positive.
        spec: bits and axis.

    Returns:
        The codes (int8, the shape and memory format of the weight) with a copy of the step sizes.

    Raises:
        RuntimeError: the shape of `scale` does not fit that of `weight`.

    Example:
        >>> encode(torch.tensor([[0.9, -7.0]]), torch.tensor([0.5]), QuantSpec(3)).codes
        tensor([[ 2, -4]], dtype=torch.int8)
    """
    scale = scale.detach().to(torch.float32, copy=True)
    codes = weight.detach().to(torch.float32) / scale.reshape(scale_shape(weight.ndim, spec.axis))
    codes.round_().clamp_(spec.qmin, spec.qmax)
    return QuantizedTensor(codes.to(torch.int8), scale, spec)
