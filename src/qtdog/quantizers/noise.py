"""The noise controls: weights are disturbed in training but never rounded, and ship in float."""

from __future__ import annotations

import torch
from torch import Tensor

from qtdog.core.quantized import QuantSpec, scale_shape
from qtdog.quantizers.base import Quantizer
from qtdog.quantizers.fixed_step import FixedStep
from qtdog.quantizers.options import QuantizerOptions


class AccumulatedNoise(Quantizer):
    """U(-a, a) is added to the weight itself before every update, so that it walks at random: `noise-accumulated`.

    One of three readings of the noise that the paper's Table 15 compares quantization with. Over n steps the walk adds
    noise of the standard deviation a · sqrt(n / 3), which the optimizer must undo.

    Args:
        weight: the weight; only its device counts.
        spec: not used; there is no grid.
        options: the amplitude a.

    Example:
        >>> weight = torch.zeros(1, 4)
        >>> noise = AccumulatedNoise(weight, QuantSpec(7), QuantizerOptions(amplitude=0.5))
        >>> noise.enable_(weight)
        >>> noise.begin_step_(weight, seed=0, progress=0.0)
        >>> bool((weight != 0).all()), bool((weight.abs() <= 0.5).all()), noise(weight) is weight
        (True, True, True)
    """

    drawn_for: Tensor

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        super().__init__(spec)
        self.amplitude = (options or QuantizerOptions()).amplitude
        self.register_buffer("drawn_for", torch.tensor(-1, device=weight.device))

    @property
    def packs(self) -> bool:
        """False: the weight ships in float."""
        return False

    def enable_(self, weight: Tensor) -> None:
        """Disturb the weight from now on."""
        self.enabled = True

    @torch.no_grad()
    def begin_step_(self, weight: Tensor, seed: int, progress: float) -> None:
        """Add the noise of this step to `weight` in place; a step that is begun again after a stop adds no more."""
        super().begin_step_(weight, seed, progress)
        if self.drawn_for.item() != seed:
            self.drawn_for.fill_(seed)
            weight.add_(2 * self.amplitude * self.uniform(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight`, which holds its noise already."""
        return weight


class FreshNoise(Quantizer):
    """In training the network sees w + U(-a, a), drawn anew at every step, on clean weights: `noise-fresh`.

    One of three readings of the noise that the paper's Table 15 compares quantization with. The gradient passes to the
    clean weight unchanged; evaluation and the shipped file have the clean weight.

    Args:
        weight: the weight; only its place in the model counts.
        spec: not used; there is no grid.
        options: the amplitude a.

    Example:
        >>> weight = torch.zeros(1, 4)
        >>> noise = FreshNoise(weight, QuantSpec(7), QuantizerOptions(amplitude=0.5))
        >>> noise.enable_(weight)
        >>> bool((noise(weight) != 0).all()), noise.eval()(weight) is weight
        (True, True)
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        super().__init__(spec)
        self.amplitude = (options or QuantizerOptions()).amplitude

    @property
    def packs(self) -> bool:
        """False: the weight ships in float."""
        return False

    def enable_(self, weight: Tensor) -> None:
        """Disturb the forward pass of training from now on."""
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the disturbed weight in training, and `weight` itself in evaluation or before `enable_`."""
        if not (self.enabled and self.training):
            return weight
        return weight + (2 * self.amplitude * self.uniform(weight)).to(weight.dtype)


class MatchedNoise(FixedStep):
    """In training the network sees w + U(-s/2, s/2), s the step size that LSQ would start with: `noise-matched`.

    The noise has the strength of rounding to that grid, s / sqrt(12), in every channel, but there is no grid: what it
    lacks against quantization is that the error of rounding depends on the weight, and stays while the weight does. The
    gradient passes to the clean weight unchanged; evaluation and the shipped file have the clean weight.

    Args:
        weight: the weight; only its shape and device count.
        spec: bits and axis of the grid that the noise matches.
        options: how LSQ's step sizes would start.

    Example:
        >>> weight = torch.tensor([[2.0, -2.0]])
        >>> noise = MatchedNoise(weight, QuantSpec(2))
        >>> noise.enable_(weight)
        >>> noise.step_sizes().tolist()
        [4.0]
        >>> bool(((noise(weight) - weight).abs() <= 2).all()), noise.eval()(weight) is weight
        (True, True)
    """

    @property
    def packs(self) -> bool:
        """False: the weight ships in float."""
        return False

    def forward(self, weight: Tensor) -> Tensor:
        """Return the disturbed weight in training, and `weight` itself in evaluation or before `enable_`."""
        if not (self.enabled and self.training):
            return weight
        scale = self.scale.reshape(scale_shape(weight.ndim, self.spec.axis))
        return weight + (self.uniform(weight) * scale).to(weight.dtype)
