"""What every weight quantizer is: a parametrization that passes weights through until it is enabled; the grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from qtdog.core.errors import ConfigError, ModelError, unknown
from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.step_size_init import DEAD_LAYER_SCALE, MIN_SCALE, initial_scale


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
    if is_transformed(source):
        return source + (value - source).detach()
    return _StraightThrough.apply(source, value)


def is_transformed(tensor: Tensor) -> bool:
    """Return whether `torch.func` (vmap, grad, …) is transforming the function that has this tensor."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(tensor)


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
        scale: float32 step sizes, shape (spec.n_scales(weight.shape),); all positive.
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
    codes = weight.detach().to(torch.float32) / spec.spread(scale, weight.shape)
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
        noise_width: of the noise that a grid gives its width, in step sizes.
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
    noise_width: float = 1.0
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
        for name in ("amplitude", "noise_width", "calibration_images", "damping"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")

    @property
    def changed(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


OPTION_NAMES = tuple(field.name for field in fields(QuantizerOptions))


class ScalarReader:
    """Reads a one-element tensor, or a sum over one, again only after it has changed: reading a GPU stalls it.

    While torch traces or transforms functions, whose tensors have no values, the last value read counts.

    Example:
        >>> tensor, read = torch.zeros(()), ScalarReader()
        >>> read(tensor), tensor.fill_(2).item(), read(tensor)
        (0.0, 2.0, 2.0)
        >>> read.fill_(tensor, 3), read(tensor)
        (None, 3)
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        self._reduce = reduce
        self._tensor: Tensor | None = None
        self._version = -1
        self._value = 0.0

    def __call__(self, tensor: Tensor) -> float:
        """Return the value of `tensor`."""
        if torch.compiler.is_compiling() or tensor.is_meta or is_transformed(tensor):
            return self._value
        if tensor.is_inference():
            return self._read(tensor)
        if tensor is not self._tensor or tensor._version != self._version:
            self._tensor, self._version, self._value = tensor, tensor._version, self._read(tensor)
        return self._value

    def _read(self, tensor: Tensor) -> float:
        return (tensor if self._reduce is None else self._reduce(tensor)).item()

    @torch.no_grad()
    def fill_(self, tensor: Tensor, value: float) -> None:
        """Set `tensor` to a value that need not be read then."""
        tensor.fill_(value)
        self._tensor, self._version, self._value = tensor, tensor._version, value

    def __getstate__(self) -> tuple[float, Callable[[Tensor], Tensor] | None]:
        """Return the value alone: a copy reads its own tensor."""
        return self._value, self._reduce

    def __setstate__(self, state: tuple[float, Callable[[Tensor], Tensor] | None]) -> None:
        """Begin with the value of the original."""
        value, reduce = state
        self.__init__(reduce)
        self._value = value


class Quantizer(nn.Module, ABC):
    """A weight parametrization; abstract.

    Its parameters and buffers exist from the start, so that optimizer groups and checkpoint keys never change during a
    run. While `enabled` is False the weight passes through untouched.

    `enabled` is part of the state dict, as the buffer `enabled_share`: 0 or 1 in a model that trains. In an average of
    the model over updates (`AveragedModel`, timm's `ModelEmaV3`) that began before `enable_`, it is the share of the
    average that was taken since, and `set_only` uses it to take the placeholders of before out of averaged step sizes.

    Parameters and buffers stay float32 when the model is cast to another type. In evaluation mode `forward` returns the
    weight that is saved: on its grid where the member has one (`packs`), whatever training adds (noise, stochastic
    rounding).

    Attributes:
        CLIPS: whether weights on or beyond the ends of the grid get no gradient.
        COMPILES: whether a pass with it can be one graph of torch.compile: it draws no numbers.
        spec: bits, the axis of the step sizes, and the levels.
        move: is added to what the network gets as its weight, which a step rule may look at elsewhere; None for none.
    """

    CLIPS: ClassVar[bool] = True
    COMPILES: ClassVar[bool] = True

    enabled_share: Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.move: Tensor | None = None
        self.register_buffer("enabled_share", torch.zeros((), dtype=torch.float32))
        self._read_share = ScalarReader()
        self._seed: int | None = None
        self._frozen: tuple[str, ...] = ()  # parameters that stand still because their weight does

    def follow_(self, weight: nn.Parameter) -> bool:
        """Let the step sizes train if `weight` does; return whether some train from now on that did not."""
        own = dict(self.named_parameters(recurse=False))
        if not weight.requires_grad:
            self._frozen += tuple(name for name, parameter in own.items() if parameter.requires_grad)
        for name in self._frozen:
            own[name].requires_grad_(weight.requires_grad)
        thawed = bool(self._frozen) and weight.requires_grad
        self._frozen = () if weight.requires_grad else self._frozen
        return thawed

    @property
    def enabled(self) -> bool:
        """Whether the forward pass does what the member is for.

        Raises:
            ModelError: `torch.export` or `torch.onnx.export` is tracing the model.
        """
        # whether ONNX asks cannot be asked within torch.compile, which its newer exporter is not
        to_onnx = not torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
        if torch.compiler.is_exporting() or to_onnx:
            raise ModelError(
                "a model with quantizers attached cannot be exported: save it (qtdog.save), load the file into a plain "
                "model (qtdog.load_into) and export that, or use qtdog.export"
            )
        return self._read_share(self.enabled_share) > 0

    @property
    def steady_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that no forward pass changes: all."""
        return tuple(self._buffers)

    def read_(self) -> None:
        """Read what a compiled pass cannot: flags that lie in tensors, and what Python computes at its first use."""
        self._read_share(self.enabled_share)
        _ = self.spec.qmin, self.spec.qmax

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._set_share_(float(value))

    def _set_share_(self, share: float) -> None:
        self._read_share.fill_(self.enabled_share, share)

    @property
    def holds_codes(self) -> bool:
        """Whether some weights are kept as codes, so that a change of the weight itself would have no effect."""
        return False

    def set_only(self, mean: Tensor, placeholder: float) -> Tensor:
        """Return the mean of the values since `enable_`, where `mean` may also count placeholders of before.

        With the share m of what was averaged since: (mean - (1 - m) · placeholder) / m, as Adam corrects its moments.

        Args:
            mean: a buffer of step sizes; one that was never averaged is returned as it is.
            placeholder: the value that it had before `enable_`.
        """
        share = self._read_share(self.enabled_share)
        return mean if share in (0.0, 1.0) else (mean - (1 - share) * placeholder) / share

    def resume_(self, value: QuantizedTensor) -> None:
        """Be enabled with the step sizes (and codes) of `value`, as a file holds them.

        Raises:
            ConfigError: the member has no step sizes of its own to go on from, or another grid.
        """
        raise ConfigError(f"{type(self).__name__} has no step sizes that it could take from a file")

    def check_grid(self, value: QuantizedTensor, n_scales: int) -> None:
        """Refuse codes of another grid than this one.

        Raises:
            ConfigError: bits, levels, axis or the number of step sizes differ.
        """
        if value.spec != self.spec or value.scale.numel() != n_scales:
            raise ConfigError(f"the file's grid is {value.spec}, {type(self).__name__} has {self.spec}")

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight behind the quantizer for `layer.weight = weight`: itself, to be quantized at the next use.

        Raises:
            ModelError: it would have no effect, since the member holds codes.
        """
        if self.holds_codes:
            raise ModelError(
                f"{type(self).__name__} holds codes, so that a new weight would have no effect: load the model's file "
                "into a plain model and change that"
            )
        return weight

    def _looks_enabled(self) -> bool:
        """Return whether the buffers differ from their placeholders: for a state dict from before `enabled_share`."""
        return False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save, and say the grid beside the tensors, where torch keeps the version of each module."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.setdefault(prefix[:-1], {})["grid"] = asdict(self.spec)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load, refuse step sizes in use of another grid, and read a state dict that lacks `enabled_share`."""
        grid, own = local_metadata.get("grid"), asdict(self.spec)
        share = state_dict.get(f"{prefix}enabled_share")
        if grid not in (None, own) and share is not None and share > 0:
            errors: list[str] = args[3]
            errors.append(f"{prefix[:-1]}: its step sizes are those of the grid {grid}; this model has {own}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        missing_keys: list[str] = args[1]
        new = {f"{prefix}enabled_share", f"{prefix}set_share"}
        missing_keys[:] = [key for key in missing_keys if key not in new]
        of_before = f"{prefix}enabled_share" not in state_dict and any(name.startswith(prefix) for name in state_dict)
        if of_before and self._looks_enabled():
            self.enabled = True

    def _apply(self, fn: Any, recurse: bool = True) -> Quantizer:
        """Move parameters and buffers as `fn` does, but leave what is float32 in that type."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast = tensor.dtype == torch.float32 and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if cast else moved

        return super()._apply(kept, recurse)

    @property
    def packs(self) -> bool:
        """Whether the weight now lies on a grid, so that `quantized` gives its codes; else it is saved in float."""
        return self.enabled

    @property
    def selectable(self) -> bool:
        """Whether a checkpoint taken now may be selected."""
        return self.enabled

    @abstractmethod
    def enable_(self, weight: Tensor) -> None:
        """Initialize from the current `weight` and do from now on what the member is for."""

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
        if self._seed is None or weight.is_meta:  # which has no generator
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
        start = torch.full((spec.n_scales(weight.shape),), DEAD_LAYER_SCALE, dtype=torch.float32, device=weight.device)
        self.register_buffer("scale", start)

    def step_sizes(self) -> Tensor:
        """Return the step sizes, float32, shape (n,)."""
        return self.set_only(self.scale, DEAD_LAYER_SCALE).clamp(min=MIN_SCALE)

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
        return encode(weight, self.step_sizes(), self.spec) if self.packs else super().quantized(weight)

    @torch.no_grad()
    def resume_(self, value: QuantizedTensor) -> None:
        """Take the step sizes of `value`."""
        self.check_grid(value, self.scale.numel())
        self.scale.copy_(value.scale)
        self.enabled = True

    def _looks_enabled(self) -> bool:
        return bool((self.scale != DEAD_LAYER_SCALE).any())
