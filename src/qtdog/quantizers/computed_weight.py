"""What `layer.weight` is while a quantizer computes it: a tensor that refuses the changes that would be lost.

The layer itself refuses what else would compute its weight: masks of `torch.nn.utils.prune`, the older weight and
spectral norm, further parametrizations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from qtdog.core.errors import ModelError
from qtdog.quantizers.base import is_transformed

# A new weight that its grid misses by more than this share of its norm is worth a warning: LSQ's start misses Gaussian
# weights by a third at 2 bits, and one that is ten times too small or too large by two thirds or more.
MAX_MISS_FRAC = 0.5

TOGETHER: ContextVar[Callable[[nn.Module], Tensor | None] | None] = ContextVar("TOGETHER", default=None)
"""What computes weights for several layers at once, given a layer's list of parametrizations; None for none."""

_HARMLESS = ("share_memory_", "detach_")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_ASSIGNING = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS)}


def _written(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield what a function of torch writes to: `out`, and the first argument where it works in place.

    Example:
        >>> list(_written("add_", ("w", 1), {})), list(_written("add", ("w", 1), {"out": "v"}))
        ([None, 'w'], ['v'])
    """
    outputs = kwargs.get("out")
    yield from outputs if isinstance(outputs, (tuple, list)) else [outputs]
    in_place = name in _ASSIGNING or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
    if args and (in_place or kwargs.get("inplace")):
        yield from args[0] if isinstance(args[0], (tuple, list)) else [args[0]]  # a list for `torch._foreach_…_`


class ComputedWeight(Tensor):
    """The weight of an enabled layer, computed at this use: a change in place would be lost, so it raises.

    Operations return plain tensors.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch, unless it writes to a computed weight.

        Raises:
            ModelError: it does.
        """
        options = kwargs or {}
        for target in _written(getattr(func, "__name__", ""), args, options):
            if isinstance(target, ComputedWeight):
                target._refuse_()
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateImportUsage]
            return func(*args, **options)

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values, which are no more writable."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._refuse_()

    def requires_grad_(  # pyright: ignore[reportIncompatibleMethodOverride]  # the stub has another name
        self, requires_grad: bool = True
    ) -> Tensor:
        """Return self, if that is how it is.

        Raises:
            ModelError: it would be a change, which is made at the weight behind the quantizer.
        """
        if requires_grad != self.requires_grad or not torch.is_grad_enabled():  # without gradients it shows False
            self._refuse_()
        return self

    def detach(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the values, which are no more writable."""
        return super().detach().as_subclass(ComputedWeight)

    def numpy(self, *, force: bool = False) -> npt.NDArray[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the values, read-only."""
        values = super().numpy(force=force)
        values.flags.writeable = False
        return values

    def _refuse_(self, *args: object, **kwargs: object) -> Any:
        raise ModelError(
            "the weight of an enabled quantizer is computed at each use, so a change in place would be lost: assign "
            "`layer.weight = value`, or change the weight behind it, `attached(model).weights_()[layer name]`"
        )


class _SoleParametrization(ParametrizationList):
    """The list of a weight's parametrizations, which takes none on top of the quantizer.

    Attributes:
        layer: name of the layer, for errors.
    """

    layer: str

    def forward(self) -> Tensor:
        """Return the computed weight: of a group of layers, if one is being computed, or alone."""
        together = None if torch.compiler.is_compiling() else TOGETHER.get()
        value = None if together is None else together(self)
        quantizer: Any = self[0]
        value = quantizer(self.original) if value is None else value
        return value if quantizer.move is None else value + quantizer.move.to(value.dtype)

    def add_module(self, name: str, module: nn.Module | None) -> NoReturn:
        """Refuse another parametrization: what it makes of the weight is on no grid."""
        _refuse_second(self.layer, type(module).__name__)

    def insert(self, index: int, module: nn.Module) -> NoReturn:
        """Refuse another parametrization."""
        _refuse_second(self.layer, type(module).__name__)


class _ParametersOfLayer(dict[str, Any]):
    """The parameters of a module, for torch's older hooks: they take the weight out of them, which is not there.

    Attributes:
        layers: names of the layers by the names of their weights in the module.
    """

    layers: dict[str, str]

    def __missing__(self, key: str) -> NoReturn:
        if key in self.layers:
            _refuse_second(self.layers[key], "a mask or norm of torch.nn.utils")
        raise KeyError(key)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            self.__missing__(key)
        super().__delitem__(key)


def _refuse_second(layer: str, what: str) -> NoReturn:
    raise ModelError(
        f"layer '{layer}' has a quantizer, and {what} would compute its weight too, on no grid: exclude the layer, put "
        f"that on before attach (the layer then stays in float), or change the weight behind the quantizer, "
        f"`attached(model).weights_()['{layer}']`"
    )


def guard_(module: nn.Module, tensor_name: str, layer: str) -> None:
    """Let `module.weight` be a `ComputedWeight` where a quantizer computes it; recurrent layers use what it returns.

    Whatever else would compute the weight is refused from now on.

    Args:
        module: its weight has a quantizer, registered with `torch.nn.utils.parametrize`.
        tensor_name: name of that weight in the module.
        layer: name of the layer, for errors.
    """
    _refuse_others_(module, tensor_name, layer)
    cls: Any = type(module)  # made by torch for this module (and its copies) alone
    computed = getattr(cls, tensor_name)

    def get(self: Any) -> Tensor:
        value = computed.fget(self)
        if value is self.parametrizations[tensor_name].original or torch.compiler.is_compiling():
            return value
        if is_transformed(value) or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return value
        if type(value) not in (Tensor, ComputedWeight):  # of a subclass with storage of its own, which has no other
            return value
        return value.as_subclass(ComputedWeight)

    def assign(self: Any, value: Tensor) -> None:
        computed.fset(self, value)
        quantizer = self.parametrizations[tensor_name][0]
        if quantizer.packs:
            _check_fit(quantizer.quantized(value).dequantize(), value.detach(), layer)

    setattr(cls, tensor_name, property(get, assign))
    _take_parameters_(cls, tensor_name, layer)
    if isinstance(module, nn.RNNBase):  # it keeps a list of its weights, which would go on to be the float ones
        module.__dict__.pop("_flat_weights", None)
        cls._flat_weights = property(_flat_weights, lambda self, value: None)


def _refuse_others_(module: nn.Module, tensor_name: str, layer: str) -> None:
    parametrizations: Any = module.get_submodule(f"parametrizations.{tensor_name}")
    parametrizations.__class__ = _SoleParametrization
    parametrizations.layer = layer
    if not isinstance(module._parameters, _ParametersOfLayer):
        module._parameters = _ParametersOfLayer(module._parameters)
        module._parameters.layers = {}
    module._parameters.layers[tensor_name] = layer


def _take_parameters_(cls: Any, tensor_name: str, layer: str) -> None:
    register = cls.register_parameter

    def register_parameter(self: Any, name: str, parameter: nn.Parameter | None) -> None:
        """Take `layer.weight = nn.Parameter(…)` for a new value, where torch would refuse a second Parameter."""
        computed = isinstance(getattr(type(self), tensor_name, None), property)  # until the quantizer is removed
        if computed and name == f"{tensor_name}_orig":
            _refuse_second(layer, "a mask of torch.nn.utils.prune")  # which keeps the weight under that name
        if computed and name == tensor_name and parameter is not None:
            setattr(self, name, parameter.detach())
        else:
            register(self, name, parameter)

    cls.register_parameter = register_parameter


def _flat_weights(self: Any) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _check_fit(on_grid: Tensor, weight: Tensor, layer: str) -> None:
    norm = weight.float().norm()
    missed = (on_grid.to(weight.device) - weight.float()).norm() / norm if norm > 0 else norm
    if missed > MAX_MISS_FRAC:
        warnings.warn(
            f"the weight that layer '{layer}' was given does not fit its step sizes: {missed:.0%} of its norm is lost. "
            "To begin with new step sizes: set_enabled(False), then enable(), of attached(model)",
            stacklevel=5,
        )
