"""Controls that separate rounding from its side effects: noise, noise then rounding, freezing, the released code."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import FixedStep, Quantizer, QuantizerOptions, ScalarReader
from qtdog.quantizers.lsq import lsq_quantize


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
        self._read_seed = ScalarReader()

    @property
    def packs(self) -> bool:
        """False: the weight is saved in float."""
        return False

    def enable_(self, weight: Tensor) -> None:
        """Disturb the weight from now on."""
        self.enabled = True

    @torch.no_grad()
    def begin_step_(self, weight: Tensor, seed: int, progress: float) -> None:
        """Add the noise of this step to `weight` in place; a step that is begun again after a stop adds no more."""
        super().begin_step_(weight, seed, progress)
        if self._read_seed(self.drawn_for) != seed:
            self._read_seed.fill_(self.drawn_for, seed)
            weight.add_(2 * self.amplitude * self.uniform(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight`, which holds its noise already."""
        return weight


class FreshNoise(Quantizer):
    """In training the network sees w + U(-a, a), drawn anew at every step, on clean weights: `noise-fresh`.

    One of three readings of the noise that the paper's Table 15 compares quantization with. The gradient passes to the
    clean weight unchanged; evaluation and the saved file have the clean weight.

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

    COMPILES: ClassVar[bool] = False

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        super().__init__(spec)
        self.amplitude = (options or QuantizerOptions()).amplitude

    @property
    def packs(self) -> bool:
        """False: the weight is saved in float."""
        return False

    def enable_(self, weight: Tensor) -> None:
        """Disturb the forward pass of training from now on."""
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the disturbed weight in training, and `weight` itself in evaluation or before `enable_`."""
        if not (self.enabled and self.training):
            return weight
        return weight + (2 * self.amplitude * self.uniform(weight)).to(weight.dtype)


class _GridNoise(FixedStep):
    """Noise as wide as `noise_width` steps of a grid; abstract."""

    COMPILES: ClassVar[bool] = False

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        super().__init__(weight, spec, options)
        self.noise_width = (options or QuantizerOptions()).noise_width

    def disturbed(self, weight: Tensor) -> Tensor:
        """Return w + U(-ks/2, ks/2), drawn anew at every step, with k the width and s the step size of each row."""
        scale = self.spec.spread(self.step_sizes(), weight.shape) * self.noise_width
        return weight + (self.uniform(weight) * scale).to(weight.dtype)


class MatchedNoise(_GridNoise):
    """In training the network sees w + U(-s/2, s/2), s the step size that LSQ would start with: `noise-matched`.

    The noise has the strength of rounding to that grid, s / sqrt(12), in every channel, but there is no grid: what it
    lacks against quantization is that the error of rounding depends on the weight, and stays while the weight does. The
    gradient passes to the clean weight unchanged; evaluation and the saved file have the clean weight.

    Args:
        weight: the weight; only its shape and device count.
        spec: bits and axis of the grid that the noise matches.
        options: how LSQ's step sizes would start, and how many of them the noise is wide.

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
        """False: the weight is saved in float."""
        return False

    def forward(self, weight: Tensor) -> Tensor:
        """Return the disturbed weight in training, and `weight` itself in evaluation or before `enable_`."""
        return self.disturbed(weight) if self.enabled and self.training else weight


class NoiseThenRound(_GridNoise):
    """In training w + U(-s/2, s/2), in evaluation and in the file the nearest point of that grid.

    The step size s is LSQ's start and stays; the noise is `noise_width` steps wide. Training never rounds, so this
    separates what the *noise* of quantization does to training from what *rounding the result* does to the model.
    Weights beyond the range of the codes get noise in training and the last code in evaluation; their gradient passes
    in training, not in evaluation. A noise of several steps of a fine grid makes a network that stands noise in its
    images, in a small file: the preset `robust` (docs/results/shift.md).

    Source: additive noise as a stand-in for rounding is that of Ballé et al. (ICLR 2017) and DiffQ (Défossez et al.,
    TMLR 2022); here it is a control.

    Args:
        weight: the weight; only its shape and device count.
        spec: bits and axis.
        options: how the step sizes start, the range of the codes, and the width of the noise.

    Example:
        >>> import torch
        >>> from qtdog.core.quantized import QuantSpec
        >>> weight = torch.tensor([[2.5, -1.5]])
        >>> quantizer = NoiseThenRound(weight, QuantSpec(2))
        >>> quantizer.enable_(weight)
        >>> bool((quantizer(weight) != 0).all()), quantizer.eval()(weight).tolist()
        (True, [[4.0, 0.0]])
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return the disturbed weight in training, its nearest points in evaluation, `weight` before `enable_`."""
        if not self.enabled:
            return weight
        if self.training:
            return self.disturbed(weight)
        scale = self.spec.spread(self.step_sizes(), weight.shape)
        return lsq_quantize(weight.float(), scale, self.spec.qmin, self.spec.qmax).to(weight.dtype)


class Freeze(Quantizer):
    """From the start step on the weight gets no gradient, so the optimizer leaves it alone; it is saved in float.

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
        """False: the weight is saved in float."""
        return False

    def enable_(self, weight: Tensor) -> None:
        """Stop the training of the weight."""
        self.enabled = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, once enabled cut off from its gradient."""
        return weight.detach() if self.enabled else weight


class Released(FixedStep):
    """At the start step the weight moves to the grid of LSQ's start, and stays there.

    In the authors' released code the optimizer still holds the parameters from before the swap to quantized layers: the
    new weights and step sizes never receive an update. What trains on is the rest, that is batch norm's scale and shift
    and the classifier. Here the same follows from a forward pass without a gradient, under a name of its own.

    Args:
        weight: the weight; only its shape and device count.
        spec: bits and axis.
        options: how the step sizes start, and the range of the codes.

    Example:
        >>> from qtdog.core.quantized import QuantSpec
        >>> weight = torch.tensor([[2.5, -1.5]], requires_grad=True)
        >>> released = Released(weight, QuantSpec(2))
        >>> released.enable_(weight)
        >>> released(weight).tolist(), released(weight).requires_grad
        ([[4.0, 0.0]], False)
    """

    @torch.no_grad()
    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on its grid, without a gradient; before `enable_`, the weight itself."""
        if not self.enabled:
            return weight
        scale = self.spec.spread(self.step_sizes(), weight.shape)
        return lsq_quantize(weight.float(), scale, self.spec.qmin, self.spec.qmax).to(weight.dtype)
