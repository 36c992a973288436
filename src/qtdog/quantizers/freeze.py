"""The control in which nothing is quantized, but the layers stop training."""

from __future__ import annotations

from torch import Tensor

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.options import QuantizerOptions


class Freeze(Quantizer):
    """From the start step on the weight gets no gradient, so the optimizer leaves it alone; it ships in float.

    An optimizer skips a parameter without a gradient altogether: neither momentum nor weight decay moves it. Beside
    `released`, which freezes the same layers on a grid, this tells what the freezing does and what the grid does.

    Args:
        weight: the weight; only its place in the model counts.
        spec: not used; there is no grid.
        options: not used.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, 2, requires_grad=True)
        >>> freeze = Freeze(weight, QuantSpec(7))
        >>> freeze.enable_(weight)
        >>> torch.equal(freeze(weight), weight), freeze(weight).requires_grad
        (True, False)
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        super().__init__(spec)

    @property
    def packs(self) -> bool:
        """False: the weight ships in float."""
        return False

    def enable_(self, weight: Tensor) -> None:
        """Stop the training of the weight."""
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, once enabled cut off from its gradient."""
        return weight.detach() if self.enabled else weight
