"""LSQ: quantization with a learned step size (Esser et al., ICLR 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qtdog.core.quantized import QuantizedTensor, QuantSpec, scale_shape
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.grid import encode
from qtdog.quantizers.lsq_function import lsq_quantize
from qtdog.quantizers.options import QuantizerOptions

# A filter whose start is below this share of its layer's mean is dead: as soon as training moved its weights, a grid
# that fine would clip them all, and without a gradient they would stay where they are.
DEAD_FRAC = 2.0**-20
# The start of a layer that is all zeros; trained layers have steps of this size.
DEAD_LAYER_SCALE = 2.0**-10
MIN_RAW_SCALE = 1e-8


class _RawScale(Function):
    """The step size itself: floored where it left the positive numbers, its gradient scaled and passed straight on."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, grad_scale: float) -> Tensor:
        ctx.grad_scale = grad_scale
        return scale.clamp(min=MIN_RAW_SCALE)

    @staticmethod
    @once_differentiable  # its type makes ctx positional-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.grad_scale, None


def initial_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return LSQ's start, s0 = 2 · mean|w| / sqrt(Qp), over the weights that share a step size.

    Source: Esser et al. (ICLR 2020), section 2.1. A dead filter (s0 zero, or next to nothing beside its layer's) gets
    the mean s0 of the living ones; a layer without living filters gets `DEAD_LAYER_SCALE`.

    Args:
        weight: any shape.
        spec: bits and axis.

    Returns:
        Positive float32 step sizes, shape (weight.shape[spec.axis],), or (1,) if spec.axis is None.

    Example:
        >>> initial_scale(torch.tensor([[2.0, -2.0], [0.0, 0.0], [4.0, 4.0]]), QuantSpec(2)).tolist()
        [4.0, 6.0, 8.0]
    """
    magnitude = weight.detach().to(torch.float32).abs()
    rows = magnitude.reshape(1, -1) if spec.axis is None else magnitude.movedim(spec.axis, 0).flatten(1)
    scale = rows.mean(dim=1) * (2 / math.sqrt(spec.qmax))
    alive = scale > scale.mean() * DEAD_FRAC
    if not alive.any():
        return torch.full_like(scale, DEAD_LAYER_SCALE)
    return torch.where(alive, scale, scale[alive].mean())


class LSQ(Quantizer):
    """LSQ as a weight parametrization: w_q = s · round(clip(w / s, -Qn, Qp)), the step size s learned.

    In "log" mode the parameter is log s, and d/dlog s = s · d/ds: a step of an adaptive optimizer changes s by a share
    of itself. In "raw" mode it is s, with LSQ's gradient scale 1 / sqrt(N · Qp), N the number of weights that share it;
    where an update takes s below 1e-8 the forward pass uses 1e-8, and the gradient, passed on as if it had not, can
    bring it back. Raw is for SGD: an adaptive optimizer cancels the gradient scale and moves s too fast.

    The parameter is float32, shape (n,), with n as in `initial_scale`; it has no meaning before `enable_`.

    Args:
        weight: the weight to quantize; only its shape and device count.
        spec: bits and axis.
        options: how the step size starts and is learned, the range of the codes, the rounding.

    Example:
        >>> weight = torch.tensor([[1.0, -1.0, 4.0]])
        >>> lsq = LSQ(weight, QuantSpec(2))
        >>> lsq(weight) is weight
        True
        >>> lsq.enable_(weight)
        >>> lsq(weight).tolist()
        [[0.0, 0.0, 4.0]]
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        super().__init__(spec)
        self.step_mode = (options or QuantizerOptions()).step_mode
        n_scales = 1 if spec.axis is None else weight.shape[spec.axis]
        self.grad_scale = 1 / math.sqrt(weight.numel() / n_scales * spec.qmax)
        start = torch.full((n_scales,), DEAD_LAYER_SCALE, dtype=torch.float32, device=weight.device)
        if self.step_mode == "log":
            self.log_scale = nn.Parameter(start.log_())
        else:
            self.scale = nn.Parameter(start)

    def step_sizes(self) -> Tensor:
        """Return the step sizes in use, float32, shape (n,), differentiable with respect to the parameter."""
        if self.step_mode == "log":
            return self.log_scale.float().exp()
        return _RawScale.apply(self.scale.float(), self.grad_scale)

    @torch.no_grad()
    def enable_(self, weight: Tensor) -> None:
        """Initialise the step sizes from the current `weight` and quantize from now on."""
        start = initial_scale(weight, self.spec)
        if self.step_mode == "log":
            self.log_scale.copy_(start.log())
        else:
            self.scale.copy_(start)
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid: same shape, type and memory format; before `enable_`, the weight itself.

        Computed in float32, also for weights of a lower precision.
        """
        if not self.enabled:
            return weight
        scale = self.step_sizes().reshape(scale_shape(weight.ndim, self.spec.axis))
        return lsq_quantize(weight.float(), scale, self.spec.qmin, self.spec.qmax).to(weight.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes and step sizes of `weight`; their product is what `forward` returns when enabled."""
        return encode(weight, self.step_sizes(), self.spec)
