"""What every weight quantizer is: a parametrization that passes weights through until it is enabled; the grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from qtdog.core.errors import ConfigError, unknown
from qtdog.core.quantized import QuantizedTensor, QuantSpec, scale_shape
from qtdog.quantizers.step_size_init import DEAD_LAYER_SCALE, initial_scale


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)  # a new tensor, since autograd may not return an input as it is

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """Return `value`, bit for bit, whose gradient passes to `source` as if it were `source` (Bengio et al., 2013).

    Written source + (value - source).detach(), the result may be rounded twice more and leave the grid.

    Args:
        source: what gets the gradient.
        value: same shape and type; no gradient passes to it.

    Example:
        >>> import torch
        >>> weight = torch.tensor([0.3, 1.6], requires_grad=True)
        >>> result = straight_through(weight, weight.detach().round())
        >>> (2 * result).sum().backward()
        >>> result.tolist(), weight.grad.tolist()
        ([0.0, 2.0], [2.0, 2.0])
    """
    return _StraightThrough.apply(source, value)


def ranged(spec: QuantSpec, range: str) -> QuantSpec:
    """Return `spec` with the integer levels of a `range`: all codes ("asymmetric") or without the lowest ("symmetric").

    Example:
        >>> ranged(QuantSpec(4), "symmetric").qmin
        -7
    """
    return replace(spec, levels="symmetric" if range == "symmetric" else "uniform")


def encode(weight: Tensor, scale: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Return the codes of the points of the grid of `scale` that are nearest to `weight` (QT-DoG, Eq. 1-2).

    codes = clamp(round(weight / scale), spec.qmin, spec.qmax), round half to even, for uniform and symmetric levels;
    clamp(floor(weight / scale), spec.qmin, spec.qmax) for half levels, whose points are codes + 1/2.

    Args:
        weight: float weights of any shape; computed in float32.
        scale: float32 step sizes, shape (weight.shape[spec.axis],), or (1,) if spec.axis is None; all positive.
        spec: bits, axis and levels, not "power_of_two".

    Returns:
        The codes (int8, the shape and memory format of the weight) with a copy of the step sizes.

    Raises:
        ValueError: levels are powers of two, which are no multiples of a step.
        RuntimeError: the shape of `scale` does not fit that of `weight`.

    Example:
        >>> encode(torch.tensor([[0.9, -7.0]]), torch.tensor([0.5]), QuantSpec(3)).codes
        tensor([[ 2, -4]], dtype=torch.int8)
        >>> encode(torch.tensor([[0.9, -7.0]]), torch.tensor([0.5]), QuantSpec(3, levels="half")).codes
        tensor([[ 1, -4]], dtype=torch.int8)
    """
    if spec.levels == "power_of_two":
        raise ValueError("powers of two are no multiples of a step size; the quantizer that has them encodes them")
    scale = scale.detach().to(torch.float32, copy=True)
    codes = weight.detach().to(torch.float32) / scale.reshape(scale_shape(weight.ndim, spec.axis))
    codes = codes.floor_() if spec.levels == "half" else codes.round_()
    return QuantizedTensor(codes.clamp_(spec.qmin, spec.qmax).to(torch.int8), scale, spec)


CHOICES = {
    "step_mode": ("log", "raw", "frozen"),
    "init": ("lsq", "lsq_plus", "minmax", "mse"),
    "range": ("asymmetric", "symmetric"),
    "rounding": ("nearest", "stochastic"),
}


@dataclass(frozen=True)
class QuantizerOptions:
    """The options of all quantizers; a member says in the registry which of them it reads.

    Attributes:
        step_mode: how the step size is learned: `log` (any optimizer), `raw` (LSQ's own, for SGD), or `frozen`.
        init: where step sizes start: `lsq`, `lsq_plus`, `minmax` or `mse`.
        range: codes -2^(b-1) … 2^(b-1) - 1 (`asymmetric`, the paper's), or without the lowest one (`symmetric`).
        rounding: in training, `nearest` or `stochastic`; evaluation and files always round to nearest.
        amplitude: a of the noise U(-a, a).
        stages: share of the weights that is frozen after each stage of INQ, rising to 1.
        calibration_images: how many training images a method after training learns from.
        damping: added to its Hessians, as a share of their mean diagonal.

    Raises:
        ConfigError: an unknown choice, with the nearest match, or a value out of range.
    """

    step_mode: str = "log"
    init: str = "lsq"
    range: str = "asymmetric"
    rounding: str = "nearest"
    amplitude: float = 5e-5
    stages: tuple[float, ...] = (0.5, 0.75, 0.875, 1.0)
    calibration_images: int = 1000
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Check the values."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(unknown(name.replace("_", " "), getattr(self, name), known))
        rising = all(a < b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if not (self.stages and rising and self.stages[0] > 0 and self.stages[-1] == 1):
            raise ConfigError(f"stages must rise from above 0 to 1, like 0.5, 0.75, 1; not {list(self.stages)}")
        for name in ("amplitude", "calibration_images", "damping"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")

    @property
    def changed(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


OPTION_NAMES = tuple(field.name for field in fields(QuantizerOptions))


class Quantizer(nn.Module, ABC):
    """A weight parametrization; abstract.

    Its parameters and buffers exist from the start, so that optimizer groups and checkpoint keys never change during a
    run. While `enabled` is False the weight passes through untouched. `enabled` is a plain flag, no part of the state
    dict: who restores a checkpoint restores it too.

    In evaluation mode `forward` returns the weight that ships: on its grid where the member has one (`packs`), whatever
    training adds (noise, stochastic rounding).

    Attributes:
        CLIPS: whether weights on or beyond the ends of the grid get no gradient.
        spec: bits, the axis of the step sizes, and the levels.
        enabled: whether the forward pass does what the member is for.
    """

    CLIPS: ClassVar[bool] = True

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = False
        self._seed: int | None = None

    @property
    def packs(self) -> bool:
        """Whether the weight now lies on a grid, so that `quantized` gives its codes; else it ships in float."""
        return self.enabled

    @property
    def shippable(self) -> bool:
        """Whether a checkpoint taken now may be selected."""
        return self.enabled

    @abstractmethod
    def enable_(self, weight: Tensor) -> None:
        """Initialise from the current `weight` and do from now on what the member is for."""

    def begin_step_(self, weight: Tensor, seed: int, progress: float) -> None:
        """Prepare for one update; called before each one once enabled.

        Args:
            weight: the weight, which a member may change in place.
            seed: of everything random in this step; all passes of one step see the same draws.
            progress: share of the quantized steps that are done, 0 at the first and below 1 at the last.
        """
        self._seed = seed

    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes and step sizes whose product is exactly what `forward(weight)` returns in evaluation mode.

        Raises:
            RuntimeError: the member has no grid, or not yet (`packs` is False).
        """
        raise RuntimeError(f"{type(self).__name__} has no codes")

    def step_sizes(self) -> Tensor | None:
        """Return the step sizes in use, float32, shape (n,), or None if the member has none."""
        return None

    def step_change(self) -> Tensor | None:
        """Return each step size as a multiple of its start, shape (n,), or None if step sizes do not move."""
        return None

    def uniform(self, weight: Tensor) -> Tensor:
        """Return draws from U(-1/2, 1/2), float32, in the shape, device and memory format of `weight`.

        The same draws in every pass of one step; without `begin_step_` (somebody's own loop) from torch's global state.
        """
        if self._seed is None:
            return torch.rand_like(weight, dtype=torch.float32) - 0.5
        generator = torch.Generator(weight.device).manual_seed(self._seed)
        drawn = torch.rand(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
        return torch.empty_like(weight, dtype=torch.float32).copy_(drawn) - 0.5

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the quantizer."""
        return f"bits={self.spec.bits}, axis={self.spec.axis}, enabled={self.enabled}"


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
