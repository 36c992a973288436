"""What the members share whose step sizes are set once: a buffer of step sizes and the grid that they span."""

from __future__ import annotations

import torch
from torch import Tensor

from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.grid import encode, ranged
from qtdog.quantizers.options import QuantizerOptions
from qtdog.quantizers.starts import DEAD_LAYER_SCALE, initial_scale


class FixedStep(Quantizer):
    """A quantizer whose step sizes start as LSQ's do and stay there; abstract.

    Args:
        weight: the weight to quantize; only its shape and device count.
        spec: bits and axis; the levels become "uniform" or "symmetric".
        options: how the step sizes start, and the range of the codes.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        chosen = options or QuantizerOptions()
        super().__init__(ranged(spec, chosen.range))
        self.init = chosen.init
        n_scales = 1 if spec.axis is None else weight.shape[spec.axis]
        self.register_buffer("scale", torch.full((n_scales,), DEAD_LAYER_SCALE, device=weight.device))

    def step_sizes(self) -> Tensor:
        """Return the step sizes, float32, shape (n,)."""
        return self.scale

    @torch.no_grad()
    def enable_(self, weight: Tensor) -> None:
        """Set the step sizes from the current `weight`, once and for all."""
        self.scale.copy_(initial_scale(weight, self.spec, self.init))
        self.enabled = True

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the nearest codes of `weight`, those beyond the range at its ends.

        Raises:
            RuntimeError: the member has no grid, or not yet (`packs` is False).
        """
        return encode(weight, self.scale, self.spec) if self.packs else super().quantized(weight)
