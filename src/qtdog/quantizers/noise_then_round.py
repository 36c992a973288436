"""Noise in training, rounding afterwards."""

from __future__ import annotations

from torch import Tensor

from qtdog.core.quantized import scale_shape
from qtdog.quantizers.fixed_step import FixedStep
from qtdog.quantizers.lsq_function import lsq_quantize


class NoiseThenRound(FixedStep):
    """In training w + U(-s/2, s/2), in evaluation and in the file the nearest point of that grid.

    The step size s is LSQ's start and stays. Training never rounds, so this separates what the *noise* of quantization
    does to training from what *rounding the result* does to the model. Weights beyond the range of the codes get noise
    in training and the last code in evaluation; their gradient passes in training, not in evaluation.

    Source: additive noise as a stand-in for rounding is that of Ballé et al. (ICLR 2017) and DiffQ (Défossez et al.,
    TMLR 2022); here it is a control.

    Args:
        weight: the weight; only its shape and device count.
        spec: bits and axis.
        options: how the step sizes start, and the range of the codes.

    Example:
        >>> import torch
        >>> from qtdog.core.quantized import QuantSpec
        >>> weight = torch.tensor([[2.5, -1.5]])
        >>> quantizer = NoiseThenRound(weight, QuantSpec(2))
        >>> quantizer.enable_(weight)
        >>> bool((quantizer(weight) != 0).all()), quantizer.eval()(weight).tolist()
        (True, [[4.0, 0.0]])
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return the disturbed weight in training, its nearest points in evaluation, `weight` before `enable_`."""
        if not self.enabled:
            return weight
        scale = self.scale.reshape(scale_shape(weight.ndim, self.spec.axis))
        if self.training:
            return weight + (self.uniform(weight) * scale).to(weight.dtype)
        return lsq_quantize(weight.float(), scale, self.spec.qmin, self.spec.qmax).to(weight.dtype)
