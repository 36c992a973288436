"""Codes that are found once, on the finished model: what every method after training leaves behind."""

from __future__ import annotations

import torch
from torch import Tensor

from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.grid import encode, ranged
from qtdog.quantizers.options import QuantizerOptions
from qtdog.quantizers.starts import DEAD_LAYER_SCALE, initial_scale


class Fixed(Quantizer):
    """A weight that trains in float until somebody gives it codes; from then on it is those codes times their steps.

    Buffers: `codes` int8 in the shape and memory format of the weight, `scale` float32 (n,); without a meaning before
    `set_`. Whoever has the codes does not look at the weight any more, and no gradient reaches it.

    Args:
        weight: the weight to quantize; only its shape, memory format and device count.
        spec: bits and axis.
        options: how the step sizes are found, and the range of the codes.
        needs_images: whether the method that finds the codes learns from images, so that `enable_` cannot.

    Example:
        >>> weight = torch.tensor([[0.9, -2.0]])
        >>> fixed = Fixed(weight, QuantSpec(2))
        >>> fixed(weight) is weight, fixed.packs
        (True, False)
        >>> fixed.set_(QuantizedTensor(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([0.5]), QuantSpec(2)))
        >>> fixed(weight).tolist()
        [[0.5, -1.0]]
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        spec: QuantSpec,
        options: QuantizerOptions | None = None,
        *,
        needs_images: bool = False,
    ) -> None:
        how = options or QuantizerOptions()
        super().__init__(ranged(spec, how.range))
        self.init = how.init
        self.needs_images = needs_images
        n_scales = 1 if spec.axis is None else weight.shape[spec.axis]
        self.register_buffer("codes", torch.zeros_like(weight, dtype=torch.int8, requires_grad=False))
        self.register_buffer("scale", torch.full((n_scales,), DEAD_LAYER_SCALE, device=weight.device))

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> QuantizedTensor:
        """Return `weight` rounded to nearest, with the step sizes of the start that the options name."""
        return encode(weight, initial_scale(weight, self.spec, self.init), self.spec)

    @torch.no_grad()
    def set_(self, value: QuantizedTensor) -> None:
        """Be `value` from now on.

        Raises:
            ValueError: its shapes or its grid are not those of this quantizer.
        """
        given = (value.codes.shape, value.scale.shape, value.spec)
        own = (self.codes.shape, self.scale.shape, self.spec)
        if given != own:
            raise ValueError(f"codes, step sizes and grid are {given}, expected {own}")
        self.codes.copy_(value.codes)
        self.scale.copy_(value.scale)
        self.enabled = True

    def enable_(self, weight: Tensor) -> None:
        """Round to nearest, which is all that can be done without images.

        Raises:
            ConfigError: the method learns from images.
        """
        if self.needs_images:
            raise ConfigError(
                "this quantizer finds its codes from images, after training: call "
                "qtdog.conversion.calibrate.calibrate_(model, method, batches) instead of enable()"
            )
        self.set_(self.rounded(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight itself, or, once there are codes, what they stand for in the weight's type."""
        return self.quantized(weight).dequantize().to(weight.dtype) if self.enabled else weight

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes that were set, whatever the weight.

        Raises:
            RuntimeError: there are none yet.
        """
        return QuantizedTensor(self.codes, self.scale, self.spec) if self.enabled else super().quantized(weight)

    def step_sizes(self) -> Tensor:
        """Return the step sizes, float32, shape (n,)."""
        return self.scale
