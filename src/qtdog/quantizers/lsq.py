"""LSQ: quantization with a learned step size (Esser et al., ICLR 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.quantized import QuantizedTensor, QuantSpec, scale_shape
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.grid import encode

STEP_MODES = ("log", "raw")
# A filter whose start step is below this share of its layer's mean is dead: on a grid that fine its weights would all be
# clipped, get no gradient, and stay dead.
DEAD_FRAC = 2.0**-20
# The start step of a layer that is all zeros: of the size that trained layers have.
DEAD_LAYER_SCALE = 2.0**-10
MIN_RAW_SCALE = 1e-8


class _Quantize(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.limits = qmin, qmax
        return (weight / scale).round_().clamp_(qmin, qmax).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, scale = ctx.saved_tensors
        qmin, qmax = ctx.limits
        ratio = weight / scale
        mask = torch.ops.aten.hardtanh_backward
        grad_weight = mask(grad, ratio, qmin, qmax)
        error = ratio.round().clamp_(qmin, qmax).sub_(mask(ratio, ratio, qmin, qmax))
        return grad_weight, error.mul_(grad).sum_to_size(scale.shape), None, None


def lsq_quantize(weight: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Return scale · clamp(round(weight / scale), qmin, qmax) with LSQ's gradients."""
    return _Quantize.apply(weight, scale, qmin, qmax)


class _RawScale(Function):
    """The step size itself: floored where it left the positive numbers, its gradient scaled and passed straight on."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, grad_scale: float) -> Tensor:
        ctx.grad_scale = grad_scale
        return scale.clamp(min=MIN_RAW_SCALE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.grad_scale, None


def initial_scale(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return LSQ's start, 2 · mean|w| / sqrt(Qp) over the weights that share a step size (Esser et al., section 2.1)."""
    magnitude = weight.detach().to(torch.float32).abs()
    if spec.axis is None:
        means = magnitude.mean().reshape(1)
    else:
        means = magnitude.movedim(spec.axis, 0).flatten(1).mean(dim=1)
    scale = means * (2 / math.sqrt(spec.qmax))
    alive = scale > scale.mean() * DEAD_FRAC
    if not alive.any():
        return torch.full_like(scale, DEAD_LAYER_SCALE)
    return torch.where(alive, scale, scale[alive].mean())


class LSQ(Quantizer):
    """LSQ as a weight parametrization."""

    def __init__(self, weight: Tensor, spec: QuantSpec, step_mode: str = "log") -> None:
        super().__init__(spec)
        if step_mode not in STEP_MODES:
            raise ConfigError(unknown("step mode", step_mode, STEP_MODES))
        self.step_mode = step_mode
        n_scales = 1 if spec.axis is None else weight.shape[spec.axis]
        self.grad_scale = 1 / math.sqrt(weight.numel() / n_scales * spec.qmax)
        start = torch.full((n_scales,), DEAD_LAYER_SCALE, device=weight.device)
        if step_mode == "log":
            self.log_scale = nn.Parameter(start.log_())
        else:
            self.scale = nn.Parameter(start)

    def step_sizes(self) -> Tensor:
        """Return the step sizes, float32, shape (n,), connected to the parameter."""
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
        """Return the quantized weight in the shape, dtype and memory format of `weight`."""
        if not self.enabled:
            return weight
        scale = self.step_sizes().reshape(scale_shape(weight.ndim, self.spec.axis))
        return lsq_quantize(weight.float(), scale, self.spec.qmin, self.spec.qmax).to(weight.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes and step sizes of `weight`."""
        return encode(weight, self.step_sizes(), self.spec)
