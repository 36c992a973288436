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
from qtdog.quantizers.grid import encode, ranged
from qtdog.quantizers.lsq_function import lsq_quantize
from qtdog.quantizers.options import QuantizerOptions
from qtdog.quantizers.starts import DEAD_LAYER_SCALE, initial_scale

MIN_RAW_FRAC = 2.0**-20  # of the start: the smallest step size of raw LSQ


class _RawScale(Function):
    """The step size itself: floored where it left the positive numbers, its gradient scaled and passed straight on."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, smallest: Tensor, grad_scale: float) -> Tensor:
        ctx.grad_scale = grad_scale
        return torch.maximum(scale, smallest)

    @staticmethod
    @once_differentiable  # its type makes ctx positional-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        return grad_outputs[0] * ctx.grad_scale, None, None


class LSQ(Quantizer):
    """LSQ as a weight parametrization: w_q = s · round(clip(w / s, -Qn, Qp)), the step size s learned.

    In "log" mode the parameter is log s, and d/dlog s = s · d/ds: a step of an adaptive optimizer changes s by a share
    of itself. In "raw" mode it is s, with LSQ's gradient scale 1 / sqrt(N · Qp), N the number of weights that share it;
    where an update takes s below 2^-20 of its start the forward pass uses that, and the gradient, passed on as if it
    had not, can bring it back. Raw is for SGD: an adaptive optimizer cancels the gradient scale and moves s too fast.
    In "frozen" mode s stays at its start, a buffer, and the weights train.

    Stochastic rounding (up with the probability of the remainder, so that its mean is w / s inside the range) is for
    training mode only; all passes of one step see the same draws. The gradient of s then has the rounding that was
    drawn in place of round(w / s). Evaluation mode and `quantized` round to nearest.

    Parameter and buffer are float32, shape (n,), with n as in `initial_scale`; they have no meaning before `enable_`.

    Args:
        weight: the weight to quantize; only its shape and device count.
        spec: bits and axis; the levels become "uniform" or "symmetric".
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

    start_scale: Tensor

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        chosen = options or QuantizerOptions()
        super().__init__(ranged(spec, chosen.range))
        self.init, self.step_mode, self.rounding = chosen.init, chosen.step_mode, chosen.rounding
        n_scales = 1 if spec.axis is None else weight.shape[spec.axis]
        self.grad_scale = 1 / math.sqrt(weight.numel() / n_scales * self.spec.qmax)
        start = torch.full((n_scales,), DEAD_LAYER_SCALE, dtype=torch.float32, device=weight.device)
        self.register_buffer("start_scale", start)
        if self.step_mode == "log":
            self.log_scale = nn.Parameter(start.log())
        elif self.step_mode == "raw":
            self.scale = nn.Parameter(start.clone())

    def step_sizes(self) -> Tensor:
        """Return the step sizes in use, float32, shape (n,), differentiable with respect to the parameter."""
        if self.step_mode == "log":
            return self.log_scale.float().exp()
        if self.step_mode == "raw":
            return _RawScale.apply(self.scale.float(), self.start_scale * MIN_RAW_FRAC, self.grad_scale)
        return self.start_scale

    def step_change(self) -> Tensor | None:
        """Return each step size as a multiple of its start, float32, shape (n,); None if they are frozen."""
        return None if self.step_mode == "frozen" else self.step_sizes().detach() / self.start_scale

    @torch.no_grad()
    def enable_(self, weight: Tensor) -> None:
        """Initialise the step sizes from the current `weight` and quantize from now on."""
        self.start_scale.copy_(initial_scale(weight, self.spec, self.init))
        if self.step_mode == "log":
            self.log_scale.copy_(self.start_scale.log())
            self.start_scale.copy_(self.step_sizes())  # what is in use, after the rounding of log and exp
        elif self.step_mode == "raw":
            self.scale.copy_(self.start_scale)
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid: same shape, type and memory format; before `enable_`, the weight itself.

        Computed in float32, also for weights of a lower precision.
        """
        if not self.enabled:
            return weight
        scale = self.step_sizes().reshape(scale_shape(weight.ndim, self.spec.axis))
        draws = self.uniform(weight).add_(0.5) if self.training and self.rounding == "stochastic" else None
        return lsq_quantize(weight.float(), scale, self.spec.qmin, self.spec.qmax, draws).to(weight.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes, rounded to nearest, and step sizes; their product is what `forward` returns in evaluation.

        Raises:
            RuntimeError: not enabled yet.
        """
        return encode(weight, self.step_sizes(), self.spec) if self.enabled else super().quantized(weight)
