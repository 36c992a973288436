"""What the paper's released code does: the layers are rounded once and then frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from qtdog.core.quantized import scale_shape
from qtdog.quantizers.fixed_step import FixedStep
from qtdog.quantizers.lsq_function import lsq_quantize


class Released(FixedStep):
    """At the start step the weight moves to the grid of LSQ's start, and stays there.

    In the authors' released code the optimizer still holds the parameters from before the swap to quantized layers: the
    new weights and step sizes never receive an update. What trains on is the rest, that is batch norm's scale and shift
    and the classifier. Here the same follows from a forward pass without a gradient, under a name of its own.

    Args:
        weight: the weight; only its shape and device count.
        spec: bits and axis.
        options: how the step sizes start, and the range of the codes.

    Example:
        >>> from qtdog.core.quantized import QuantSpec
        >>> weight = torch.tensor([[2.5, -1.5]], requires_grad=True)
        >>> released = Released(weight, QuantSpec(2))
        >>> released.enable_(weight)
        >>> released(weight).tolist(), released(weight).requires_grad
        ([[4.0, 0.0]], False)
    """

    @torch.no_grad()
    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid, without a gradient; before `enable_`, the weight itself."""
        if not self.enabled:
            return weight
        scale = self.scale.reshape(scale_shape(weight.ndim, self.spec.axis))
        return lsq_quantize(weight.float(), scale, self.spec.qmin, self.spec.qmax).to(weight.dtype)
