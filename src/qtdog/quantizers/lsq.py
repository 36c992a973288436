"""LSQ: quantization with a learned step size (Esser et al., ICLR 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import Quantizer, QuantizerOptions, ScalarReader, encode, is_transformed, ranged
from qtdog.quantizers.step_size_init import DEAD_LAYER_SCALE, initial_scale

# On a CPU a weight is worked on in blocks of about this many values, so that every pass but the first finds them in the
# processor's cache; a GPU takes the whole tensor at once.
BLOCK = 2**18

mask = torch.ops.aten.hardtanh_backward  # (g, u, low, high): g where low < u < high, else 0


def lsq_quantize(weight: Tensor, scale: Tensor, qmin: int, qmax: int, draws: Tensor | None = None) -> Tensor:
    """Return scale · clamp(round(weight / scale), qmin, qmax), with LSQ's straight-through gradients.

    With draws r from U[0, 1) rounding is stochastic: floor(u), or one more where r < u - floor(u), so that its mean is
    u inside the range (Gupta et al., ICML 2015, section 2.2). That is floor(u + r) with 1 - r for r, but free of the
    rounding of a sum. The gradients are the same, with the rounding that was drawn in place of round(u).

    With u = weight / scale and Esser et al. (ICLR 2020), Eq. 3 and 5:

        ∂/∂weight = 1                 where qmin < u < qmax, else 0
        ∂/∂scale  = round(u) - u      where qmin < u < qmax,
                    qmin              where u ≤ qmin,
                    qmax              where u ≥ qmax

    The gradient of a scale is summed over the weights that share it; LSQ's gradient scale is not applied here. Rounding
    is half to even, as in `encode`, whose codes times scale are this function's result bit for bit.

    Args:
        weight: float32 or float64, any shape and memory format, which result and gradient keep.
        scale: positive step sizes, same type, a shape that broadcasts to that of `weight`.
        qmin: smallest code.
        qmax: largest code.
        draws: r, same type, shape and memory format as `weight`; None rounds to nearest.

    Raises:
        RuntimeError: the shapes do not broadcast.

    Example:
        >>> weight = torch.tensor([0.3, -0.9, 5.0], requires_grad=True)
        >>> scale = torch.tensor([0.5], requires_grad=True)
        >>> result = lsq_quantize(weight, scale, -4, 3)
        >>> result.tolist()
        [0.5, -1.0, 1.5]
        >>> result.sum().backward()
        >>> weight.grad.tolist(), round(scale.grad.item(), 4)  # 0.4 - 0.2 + 3
        ([1.0, 1.0, 0.0], 3.2)
    """
    missing = weight.ndim - scale.ndim
    steps = scale.reshape((1,) * missing + scale.shape) if missing else scale
    if torch.compiler.is_compiling():
        return _quantize_in_graph(weight, steps, qmin, qmax, draws)
    if is_transformed(weight) or is_transformed(scale):
        return _quantize_transformed(weight, steps, qmin, qmax, draws)
    return _Quantize.apply(weight, steps, draws, (qmin, qmax))


def _quantize_transformed(weight: Tensor, scale: Tensor, qmin: int, qmax: int, draws: Tensor | None) -> Tensor:
    """Do as `lsq_quantize` with operations that `torch.func` can transform; the value may be off by a rounding."""
    ratio = weight / scale
    inside = (ratio > qmin) & (ratio < qmax)
    ratio = torch.where(inside, ratio, ratio.detach().clamp(qmin, qmax))
    below = ratio.detach().floor()
    up = ratio.detach() - below
    code = ratio.detach().round() if draws is None else below + (draws < up)
    return (ratio + (code - ratio.detach())) * scale


def _quantize_in_graph(weight: Tensor, scale: Tensor, qmin: int, qmax: int, draws: Tensor | None) -> Tensor:
    """Do as `lsq_quantize` with operations that a compiler fuses: the same values, the gradients up to rounding."""
    free, fixed = weight.detach(), scale.detach()
    ratio = free / fixed
    inside = (ratio > qmin) & (ratio < qmax)
    below = ratio.floor()
    code = (ratio.round() if draws is None else below + (draws < ratio - below)).clamp(qmin, qmax) + 0.0
    moved = torch.where(inside, weight - free, 0.0)  # zero, with the gradient of the weight
    return code * scale + moved - torch.where(inside, ratio, 0.0) * (scale - fixed)


class _Quantize(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, draws: Tensor | None, ends: tuple[int, int]) -> Tensor:
        result = torch.empty_like(weight)
        ctx.ends, ctx.clipped = ends, False
        others = (scale, result) if draws is None else (scale, result, draws)
        for part, steps, out, *drawn in _blocks(weight, *others):
            torch.div(part, steps, out=out)
            leaves = _may_leave(out, *ends)
            ctx.clipped |= leaves
            if drawn:
                below = out.floor()
                out.copy_(below + (drawn[0] < out - below))
            if leaves:
                out.clamp_(*ends)
            out.round_().add_(0.0).mul_(steps)  # adding zero makes -0 the 0 that an integer code is
        ctx.save_for_backward(weight, scale, result)
        return result

    @staticmethod
    @once_differentiable  # its type makes ctx positional-only
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,) = grad_outputs
        weight, scale, result = ctx.saved_tensors
        learned = ctx.needs_input_grad[1]
        # If nothing is clipped the gradient passes as it is: no second tensor of the weight's size is touched.
        grad_weight = torch.empty_like(weight) if ctx.clipped else grad
        grad_scale = torch.zeros_like(scale)
        for part, steps, out, given, passed, summed in _blocks(weight, scale, result, grad, grad_weight, grad_scale):
            inside, free = part, None
            if ctx.clipped:
                ratio = part / steps
                mask.grad_input(given, ratio, *ctx.ends, grad_input=passed)
                inside = free = mask.grad_input(part, ratio, *ctx.ends, grad_input=ratio)
            if learned:
                error = torch.sub(out, inside, out=free)
                summed += error.mul_(given).sum_to_size(steps.shape)
        return grad_weight, grad_scale.div_(scale) if learned else None, None, None


def _blocks(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield cache-sized slices of `weight` along its first dimension, each with the slices of the others."""
    if weight.device.type != "cpu" or weight.numel() <= BLOCK:
        yield weight, *others
        return
    n_rows = max(1, BLOCK * weight.shape[0] // weight.numel())
    for start in range(0, weight.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        yield weight[rows], *(other[rows] if other.shape[0] > 1 else other for other in others)


def _may_leave(ratio: Tensor, qmin: int, qmax: int) -> bool:
    """Return False only if all values lie strictly inside; on a GPU True without looking, which would stall it."""
    if ratio.device.type != "cpu" or not ratio.numel():
        return True
    low, high = ratio.amin(), ratio.amax()  # aminmax is slower, three times so for kernels in channels-last
    return not (low > qmin and high < qmax)


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
        n_scales = spec.n_scales(weight.shape)
        self.grad_scale = 1 / math.sqrt(weight.numel() / n_scales * self.spec.qmax)
        start = torch.full((n_scales,), DEAD_LAYER_SCALE, dtype=torch.float32, device=weight.device)
        self.register_buffer("start_scale", start)
        self._read_set_share = ScalarReader()
        if self.step_mode == "log":
            self.log_scale = nn.Parameter(start.log())
        elif self.step_mode == "raw":
            self.scale = nn.Parameter(start.clone())
        if self.step_mode != "frozen":
            self.set_share = nn.Parameter(
                torch.zeros(1, device=weight.device), requires_grad=False
            )  # FSDP wants no scalar

    def step_sizes(self) -> Tensor:
        """Return the step sizes in use, float32, shape (n,), differentiable with respect to the parameter."""
        if self.step_mode == "log":
            return self._set_parameter(self.log_scale.float(), math.log(DEAD_LAYER_SCALE)).exp()
        start = self.set_only(self.start_scale, DEAD_LAYER_SCALE)
        if self.step_mode == "raw":
            scale = self._set_parameter(self.scale.float(), DEAD_LAYER_SCALE)
            if torch.compiler.is_compiling():
                fixed = scale.detach()
                return torch.maximum(fixed, start * MIN_RAW_FRAC) + (scale - fixed) * self.grad_scale
            return _RawScale.apply(scale, start * MIN_RAW_FRAC, self.grad_scale)
        return start

    def _set_parameter(self, mean: Tensor, placeholder: float) -> Tensor:
        """Do for a parameter what `set_only` does for a buffer: an average may count the one and copy the other."""
        share = self._read_set_share(self.set_share)
        return mean if share in (0.0, 1.0) else (mean - (1 - share) * placeholder) / share

    @property
    def is_average(self) -> bool:
        """Whether the step sizes are an average that counts placeholders of before `enable_`."""
        return self.step_mode != "frozen" and self._read_set_share(self.set_share) not in (0.0, 1.0)

    def read_(self) -> None:
        """Read what share of an average the step sizes are."""
        super().read_()
        if self.step_mode != "frozen":
            self._read_set_share(self.set_share)

    def _set_share_(self, share: float) -> None:
        super()._set_share_(share)
        if self.step_mode != "frozen":
            self._read_set_share.fill_(self.set_share, share)

    def step_change(self) -> Tensor | None:
        """Return each step size as a multiple of its start, float32, shape (n,); None if they are frozen."""
        return (
            None
            if self.step_mode == "frozen"
            else self.step_sizes().detach() / self.set_only(self.start_scale, DEAD_LAYER_SCALE)
        )

    @torch.no_grad()
    def enable_(self, weight: Tensor) -> None:
        """Initialize the step sizes from the current `weight` and quantize from now on."""
        self._begin_(initial_scale(weight, self.spec, self.init))

    def _begin_(self, scale: Tensor) -> None:
        self.start_scale.copy_(scale)
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
        scale = self.spec.spread(self.step_sizes(), weight.shape)
        draws = self.uniform(weight).add_(0.5) if self.training and self.rounding == "stochastic" else None
        return lsq_quantize(weight.float(), scale, self.spec.qmin, self.spec.qmax, draws).to(weight.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes, rounded to nearest, and step sizes; their product is what `forward` returns in evaluation.

        Raises:
            RuntimeError: not enabled yet.
        """
        return encode(weight, self.step_sizes(), self.spec) if self.enabled else super().quantized(weight)

    @torch.no_grad()
    def resume_(self, value: QuantizedTensor) -> None:
        """Take the step sizes of `value`, in log mode up to the rounding of a logarithm."""
        self.check_grid(value, self.start_scale.numel())
        self._begin_(value.scale)

    def _looks_enabled(self) -> bool:
        return bool((self.start_scale != DEAD_LAYER_SCALE).any())
