"""What every weight quantizer is: a parametrization that passes weights through until it is enabled."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from qtdog.core.quantized import QuantizedTensor, QuantSpec


class Quantizer(nn.Module, ABC):
    """A weight parametrization on a grid; abstract.

    Its parameters exist from the start, so that optimizer groups and checkpoint keys never change during a run. While
    `enabled` is False the weight passes through untouched. `enabled` is a plain flag, no part of the state dict: who
    restores a checkpoint restores it too.

    Attributes:
        spec: bits, and the axis of the step sizes.
        enabled: whether the forward pass quantizes.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = False

    @abstractmethod
    def enable_(self, weight: Tensor) -> None:
        """Initialise the grid from the current `weight` and quantize from now on."""

    @abstractmethod
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes and step sizes whose product is exactly what `forward(weight)` returns when enabled."""

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the quantizer."""
        return f"bits={self.spec.bits}, axis={self.spec.axis}, enabled={self.enabled}"
