"""The plain straight-through quantizer: rounding to a min-max grid that follows the weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.quantized import QuantizedTensor, QuantSpec, scale_shape
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.grid import encode, ranged
from qtdog.quantizers.lsq_function import lsq_quantize
from qtdog.quantizers.options import QuantizerOptions
from qtdog.quantizers.starts import MIN_SCALE, largest_scale, minmax_start, rows_of
from qtdog.quantizers.straight_through import straight_through


class STE(Quantizer):
    """w_q = s · round(w / s) with s = max(max w / Qp, max -w / Qn), computed anew from the weight in every pass.

    Nothing is learned but the weight, and nothing is clipped; the gradient passes to the weight as if there were no
    rounding (Bengio et al., 2013; with a min-max grid as in Jacob et al., CVPR 2018), none passes through s.

    Stochastic rounding is for training mode only; evaluation mode and `quantized` round to nearest.

    Args:
        weight: the weight to quantize; not looked at yet.
        spec: bits and axis; the levels become "uniform" or "symmetric".
        options: the range of the codes, the rounding.

    Example:
        >>> weight = torch.tensor([[0.4, -0.6, 3.0]], requires_grad=True)
        >>> ste = STE(weight, QuantSpec(3))
        >>> ste.enable_(weight)
        >>> ste(weight).tolist()
        [[0.0, -1.0, 3.0]]
        >>> ste(weight).sum().backward()
        >>> weight.grad.tolist()
        [[1.0, 1.0, 1.0]]
    """

    CLIPS: ClassVar[bool] = False  # the grid reaches as far as the weights

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        chosen = options or QuantizerOptions()
        super().__init__(ranged(spec, chosen.range))
        self.rounding = chosen.rounding

    def enable_(self, weight: Tensor) -> None:
        """Quantize from now on."""
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid: same shape, type and memory format; before `enable_`, the weight itself.

        Computed in float32, also for weights of a lower precision.
        """
        if not self.enabled:
            return weight
        latent, scale = weight.detach().float(), self._scale(weight)
        draws = self.uniform(weight).add_(0.5) if self.training and self.rounding == "stochastic" else None
        steps = scale.reshape(scale_shape(weight.ndim, self.spec.axis))
        value = lsq_quantize(latent, steps, self.spec.qmin, self.spec.qmax, draws)
        return straight_through(weight, value.to(weight.dtype))

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes, rounded to nearest, and step sizes; their product is what `forward` returns in evaluation.

        Raises:
            RuntimeError: not enabled yet.
        """
        return encode(weight, self._scale(weight), self.spec) if self.enabled else super().quantized(weight)

    @torch.no_grad()
    def _scale(self, weight: Tensor) -> Tensor:
        scale = minmax_start(rows_of(weight, self.spec.axis).float(), self.spec)
        return scale.clamp(MIN_SCALE, largest_scale(weight.dtype, self.spec))
