"""Fake quantization of activations during training: one grid for the input of each layer whose weight is quantized.

Signed or unsigned as the input needs: where the first batch has no negative value the codes are 0 … 2^b - 1, else
-2^(b-1) … 2^(b-1) - 1. The step size is learned as LSQ learns it (Esser et al., ICLR 2020, per tensor, here on a log
scale), or follows the largest values by a moving average (Jacob et al., CVPR 2018, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qtdog.quantizers.base import Quantizer, ScalarReader
from qtdog.quantizers.lsq import lsq_quantize

MOMENTUM = 0.99
"""Of the moving average of the largest value, per forward pass in training."""
SMALLEST = 2.0**-20
CHILD = "activation"
"""Name of the module in the weight's quantizer, whose state it shares in checkpoints and averages."""


@dataclass(frozen=True)
class ActivationGrid:
    """What an activation may be: scale · code, code from `qmin` to `qmax`.

    Attributes:
        bits: 2 to 8.
        signed: whether there are negative codes.
        scale: step size.
    """

    bits: int
    signed: bool
    scale: float

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2**self.bits - 1 + self.qmin

    def __call__(self, values: Tensor) -> Tensor:
        """Return the nearest points, bit for bit those of training, with operations that can be exported.

        Example:
            >>> ActivationGrid(2, False, 0.5)(torch.tensor([-1.0, 0.7, 9.0])).tolist()
            [0.0, 0.5, 1.5]
        """
        scale = torch.tensor(self.scale, dtype=torch.float32, device=values.device)
        return ((values / scale).clamp(self.qmin, self.qmax).round() + 0.0) * scale


class ActivationQuantizer(nn.Module):
    """The grid of one layer's input, which begins with the first batch of training after quantization began.

    Args:
        bits: 2 to 8.
        mode: "learned" or "moving".

    Example:
        >>> quantizer = ActivationQuantizer(4, "moving")
        >>> quantizer(torch.tensor([0.0, 1.5])).tolist(), quantizer.grid().scale
        ([0.0, 1.5], 0.10000000149011612)
    """

    started: Tensor
    signed: Tensor
    moving: Tensor

    def __init__(self, bits: int, mode: str) -> None:
        super().__init__()
        self.bits, self.mode = bits, mode
        self.register_buffer("started", torch.zeros(1, dtype=torch.bool))
        self.register_buffer("signed", torch.zeros(1, dtype=torch.bool))
        if mode == "learned":
            self.log_scale = nn.Parameter(torch.zeros(1))
        else:
            self.register_buffer("moving", torch.ones(1))
        self._read_started, self._read_signed = ScalarReader(), ScalarReader()
        self.steady_buffers = ("started", "signed")  # once the grid has begun

    @property
    def is_signed(self) -> bool:
        """Whether there are negative codes."""
        return bool(self._read_signed(self.signed))

    def ends(self) -> tuple[int, int]:
        """Return the smallest and largest code."""
        grid = ActivationGrid(self.bits, self.is_signed, 1.0)
        return grid.qmin, grid.qmax

    def scale(self) -> Tensor:
        """Return the step size, float32 (1,), differentiable where it is learned."""
        if self.mode == "learned":
            return self.log_scale.float().exp()
        return self.moving / self.ends()[1]

    def grid(self) -> ActivationGrid:
        """Return the grid in use."""
        return ActivationGrid(self.bits, self.is_signed, self.scale().detach().item())

    @torch.no_grad()
    def _start_(self, values: Tensor) -> None:
        self.signed.fill_(bool((values < 0).any()))
        self.started.fill_(True)
        qmax = self.ends()[1]
        if self.mode == "learned":  # LSQ's start
            scale = (2 * values.float().abs().mean() / math.sqrt(qmax)).clamp(min=SMALLEST)
            self.log_scale.copy_(scale.log())
        else:
            self.moving.copy_(values.float().abs().amax().clamp(min=SMALLEST))

    def forward(self, values: Tensor) -> Tensor:
        """Return the values on the grid; in training the grid begins or moves with them."""
        if not self._read_started(self.started):
            if not self.training:
                return values
            self._start_(values)
        elif self.training and self.mode == "moving":
            with torch.no_grad():
                self.moving.lerp_(values.float().abs().amax().clamp(min=SMALLEST), 1 - MOMENTUM)
        scale = self.scale().reshape((1,) * values.ndim)
        return lsq_quantize(values.float(), scale, *self.ends()).to(values.dtype)


def _quantized_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Quantize the first input of a layer; it finds the quantizer in the module, so that copies use their own."""
    quantizer: Any = module.get_submodule("parametrizations.weight.0")
    return (getattr(quantizer, CHILD)(inputs[0]), *inputs[1:]) if quantizer.enabled else None


def quantize_inputs_(module: nn.Module, bits: int, mode: str) -> None:
    """Let a layer with a quantized `weight` quantize its input too, from when the weight's quantizer is enabled.

    Args:
        module: a convolution or linear layer to which a quantizer is attached.
        bits: 2 to 8.
        mode: "learned" or "moving".
    """
    assert is_parametrized(module, "weight")
    quantizer = module.get_submodule("parametrizations.weight.0")
    assert isinstance(quantizer, Quantizer)
    device = next(module.parameters()).device
    quantizer.add_module(CHILD, ActivationQuantizer(bits, mode).to(device))
    module.register_forward_pre_hook(_quantized_input)


def fix_inputs_(module: nn.Module, grid: ActivationGrid) -> None:
    """Let a plain layer round its input to a grid that stays."""
    module.register_forward_pre_hook(lambda layer, inputs: (grid(inputs[0]), *inputs[1:]))
