"""Straight-through quantizers: a min-max grid that follows the weight, and DoReFa (Zhou et al., 2016)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import Quantizer, QuantizerOptions, encode, ranged, straight_through
from qtdog.quantizers.lsq import lsq_quantize
from qtdog.quantizers.step_size_init import MIN_SCALE, largest_scale, minmax_init


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
        steps = self.spec.spread(scale, weight.shape)
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
        scale = minmax_init(self.spec.rows(weight).float(), self.spec)
        return scale.clamp(MIN_SCALE, largest_scale(weight.dtype, self.spec))


class DoReFa(Quantizer):
    """w_q = M · (2 · round((2^b - 1) · x) / (2^b - 1) - 1) with x = tanh(w) / (2M) + 1/2 and M = max|tanh w|.

    Source: Zhou et al. (arXiv:1606.06160, 2016), Eq. 9, whose result lies in [-1, 1]. Here it is multiplied by M, so
    that a pretrained network keeps its function, also where its batch norm is frozen and cannot take up a factor. M is
    the maximum over the weights that share a step size, computed anew in every forward pass.

    The points are the half levels s · (c + 1/2), s = 2M / (2^b - 1), from -M to M: there is no zero, and a weight of
    zero becomes s/2. The gradient of the rounding is taken as 1 and that of M as 0, so ∂w_q/∂w = 1 - tanh²(w).

    Args:
        weight: the weight to quantize; not looked at yet.
        spec: bits and axis; the levels become "half".
        options: none of them is read.

    Example:
        >>> weight = torch.tensor([[0.0, -0.2, 0.4]], requires_grad=True)
        >>> dorefa = DoReFa(weight, QuantSpec(2))
        >>> dorefa.enable_(weight)
        >>> [round(value, 3) for value in dorefa(weight)[0].tolist()]  # tanh(0.4) = 0.38
        [0.127, -0.127, 0.38]
        >>> dorefa.quantized(weight).codes.tolist()
        [[0, -1, 1]]
    """

    CLIPS: ClassVar[bool] = False  # the grid reaches as far as the weights

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        super().__init__(replace(spec, levels="half"))

    def enable_(self, weight: Tensor) -> None:
        """Quantize from now on."""
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid: same shape, type and memory format; before `enable_`, the weight itself.

        Computed in float32, also for weights of a lower precision.
        """
        if not self.enabled:
            return weight
        squeezed = weight.float().tanh()
        scale = self._scale(squeezed.detach())
        steps = self.spec.spread(scale, weight.shape)
        points = (squeezed.detach() / steps).floor_().clamp_(self.spec.qmin, self.spec.qmax).add_(0.5)
        return straight_through(squeezed, points.mul_(steps)).to(weight.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes and step sizes; point times step size is what `forward` returns.

        Raises:
            RuntimeError: not enabled yet.
        """
        if not self.enabled:
            return super().quantized(weight)
        squeezed = weight.float().tanh()
        return encode(squeezed, self._scale(squeezed), self.spec)

    def _scale(self, squeezed: Tensor) -> Tensor:
        largest = self.spec.rows(squeezed).abs().amax(dim=1)
        return (largest * (2 / (2**self.spec.bits - 1))).clamp(min=MIN_SCALE)
