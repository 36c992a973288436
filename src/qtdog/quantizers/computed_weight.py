"""What `layer.weight` is while a quantizer computes it: a tensor that refuses the changes that would be lost."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtdog.core.errors import ModelError
from qtdog.quantizers.base import is_transformed


class ComputedWeight(Tensor):
    """The weight of an enabled layer, computed at this use: a change in place would be lost, so it raises."""

    # operations return plain tensors, at no cost
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values, which are no more writable."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._refuse_()

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


_HARMLESS = ("requires_grad_", "share_memory_", "detach_")
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_ASSIGNING = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS)}
for _name in dir(Tensor):
    if _name in _ASSIGNING or (_name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS):
        setattr(ComputedWeight, _name, ComputedWeight._refuse_)


def guard_(module: nn.Module, tensor_name: str) -> None:
    """Let `module.weight` be a `ComputedWeight` where a quantizer computes it; recurrent layers use what it returns.

    Args:
        module: its weight has a quantizer, registered with `torch.nn.utils.parametrize`.
        tensor_name: name of that weight in the module.
    """
    cls: Any = type(module)  # made by torch for this module (and its copies) alone
    computed = getattr(cls, tensor_name)

    def get(self: Any) -> Tensor:
        value = computed.fget(self)
        if value is self.parametrizations[tensor_name].original or torch.compiler.is_compiling():
            return value
        if is_transformed(value) or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return value
        return value.as_subclass(ComputedWeight)

    setattr(cls, tensor_name, property(get, computed.fset))
    register = cls.register_parameter

    def register_parameter(self: Any, name: str, parameter: nn.Parameter | None) -> None:
        """Take `layer.weight = nn.Parameter(…)` for a new value, where torch would refuse a second Parameter."""
        if name == tensor_name and parameter is not None and isinstance(getattr(cls, name, None), property):
            setattr(self, name, parameter.detach())
        else:
            register(self, name, parameter)

    cls.register_parameter = register_parameter
    if isinstance(module, nn.RNNBase):  # it keeps a list of its weights, which would go on to be the float ones
        module.__dict__.pop("_flat_weights", None)
        cls._flat_weights = property(_flat_weights, lambda self, value: None)


def _flat_weights(self: Any) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]
