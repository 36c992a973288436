"""INQ: weights frozen on powers of two, share by share (Zhou et al., ICLR 2017)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from qtdog.core.quantized import QuantizedTensor, QuantSpec
from qtdog.quantizers.base import Quantizer, QuantizerOptions, ScalarReader

# A filter whose largest weight is below this share of its layer's is dead: levels that small could not hold what
# training makes of it, so it gets those of the layer.
DEAD_FRAC = 2.0**-20
# Largest level of a layer that is all zeros.
DEAD_LAYER_LEVEL = 2.0**-10


def largest_level(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return 2^n1, the largest level of each group of weights that share their levels.

    Formula: n1 = floor(log2(4S/3)), S = max|w|, so that 3/4 · 2^n1 ≤ S < 3/2 · 2^n1. Source: Zhou et al. (ICLR 2017),
    Eq. 3. Computed from the binary exponent of S, without a logarithm that could round across a boundary. A dead filter
    gets the level of the whole layer.

    Args:
        weight: any shape; computed in float32.
        spec: says which weights share their levels.

    Returns:
        Powers of two, float32, shape (spec.n_scales(weight.shape),).

    Example:
        >>> largest_level(torch.tensor([[0.75, 0.1], [-0.74, 0.1], [0.0, 0.0]]), QuantSpec(4)).tolist()
        [1.0, 0.5, 1.0]
    """
    magnitude = weight.detach().to(torch.float32).abs()
    largest = spec.rows(magnitude).amax(dim=1)
    peak = largest.max()
    alive = largest > peak * DEAD_FRAC
    if not alive.any():
        return torch.full_like(largest, DEAD_LAYER_LEVEL)
    largest = torch.where(alive, largest, peak)
    mantissa = torch.frexp(largest).mantissa
    power = largest / mantissa  # exact: S = mantissa · 2^e with a mantissa from 1/2 to 1
    return torch.where(mantissa < 0.75, power / 2, power)


def power_of_two_codes(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return the codes of the levels {0, ±2^n2 … ±2^n1} that stand for `weight`.

    Formula: sgn(w) · β where (α + β)/2 ≤ |w| < 3β/2 for neighbouring levels α < β, else 0; what lies above all levels
    gets the largest. Source: Zhou et al. (ICLR 2017), Eq. 2 and 4. There are K = 2^(b-2) levels of each sign: the code
    of ±β is ±(K - log2(scale / β)). The relative error is at most 1/3 from 3/4 · 2^n2 to 3/2 · 2^n1.

    Args:
        weight: any shape; computed in float32.
        scale: 2^n1, as `largest_level` returns it.
        spec: bits and axis, with levels "power_of_two".

    Returns:
        Codes in -K … K, int8, in the shape and memory format of `weight`.

    Example:
        >>> spec = QuantSpec(4, axis=None, levels="power_of_two")  # levels 1, 1/2, 1/4, 1/8
        >>> weight = torch.tensor([1.4, 0.75, -0.7, 0.0625, 0.06])
        >>> power_of_two_codes(weight, torch.ones(1), spec).tolist()
        [4, 4, -3, 1, 0]
    """
    ratio = weight.detach().to(torch.float32) / spec.spread(scale, weight.shape)
    magnitude = ratio.abs()
    mantissa, exponent = torch.frexp(magnitude)
    exponent -= (mantissa < 0.75).int()  # now 3/4 · 2^exponent ≤ magnitude < 3/2 · 2^exponent
    codes = exponent.add_(spec.qmax).clamp_(1, spec.qmax)
    codes.masked_fill_(magnitude < 2.0**-spec.qmax, 0)  # below half of the smallest level
    return codes.mul_(ratio.sign().int()).to(torch.int8)


class INQ(Quantizer):
    """Incremental quantization: a growing share of the weights becomes powers of two and never changes again.

    The levels are set once, by `enable_`. The quantized steps are divided evenly among the stages; when stage i begins,
    the largest magnitudes among the weights that still train are rounded and frozen until `stages[i]` of the layer are.
    The rest trains on in float. The last stage freezes everything, and only then is there a model to save.

    What is frozen is kept in codes, apart from the weight that the optimizer holds: momentum or decay may move that
    one, the forward pass does not see it.

    Source: Zhou et al. (ICLR 2017), section 2; shares 50, 75, 87.5 and 100 % as there. They share levels within a layer
    (`spec.axis` None).

    Args:
        weight: the weight to quantize; only its shape, device and memory format count.
        spec: bits and axis; the levels become "power_of_two".
        options: the stages.

    Example:
        >>> weight = torch.tensor([[0.9, -0.4, 0.3, 0.1]])
        >>> inq = INQ(weight, QuantSpec(3), QuantizerOptions(stages=(0.5, 1.0)))
        >>> inq.enable_(weight)
        >>> [round(value, 1) for value in inq(weight)[0].tolist()], inq.packs
        ([1.0, -0.5, 0.3, 0.1], False)
        >>> inq.begin_step_(weight, seed=0, progress=0.5)
        >>> inq(weight)[0].tolist(), inq.packs
        ([1.0, -0.5, 0.5, 0.0], True)
    """

    CLIPS: ClassVar[bool] = False  # what is frozen gets no gradient anyway

    scale: Tensor
    codes: Tensor
    frozen: Tensor

    def __init__(self, weight: Tensor, spec: QuantSpec, options: QuantizerOptions | None = None) -> None:
        super().__init__(replace(spec, levels="power_of_two"))
        self.stages = (options or QuantizerOptions()).stages
        like = weight.detach()
        start = torch.full((spec.n_scales(weight.shape),), DEAD_LAYER_LEVEL, dtype=torch.float32, device=weight.device)
        self.register_buffer("scale", start)
        self.register_buffer("codes", torch.zeros_like(like, dtype=torch.int8))
        self.register_buffer("frozen", torch.zeros_like(like, dtype=torch.bool))
        self._count = ScalarReader(torch.count_nonzero)

    @property
    def packs(self) -> bool:
        """Whether every weight is frozen, so that the whole weight lies on its levels."""
        return self.enabled and self._n_frozen() == self.frozen.numel()

    @property
    def selectable(self) -> bool:
        """Whether every weight is frozen."""
        return self.packs

    @torch.no_grad()
    def enable_(self, weight: Tensor) -> None:
        """Set the levels from the current `weight` and freeze the share of the first stage."""
        self.scale.copy_(largest_level(weight, self.spec))
        self.frozen.fill_(False)
        self.enabled = True
        self._freeze_(weight, self.stages[0])

    @torch.no_grad()
    def begin_step_(self, weight: Tensor, seed: int, progress: float) -> None:
        """Freeze what the stage at `progress` asks for, if it is not frozen yet; `weight` itself stays as it is."""
        super().begin_step_(weight, seed, progress)
        n_stages = len(self.stages)
        stage = sum(progress >= index / n_stages for index in range(1, n_stages))
        self._freeze_(weight, self.stages[stage])

    def forward(self, weight: Tensor) -> Tensor:
        """Return the frozen weights on their levels and the others as they are, which alone get gradients."""
        if not self.enabled:
            return weight
        return torch.where(self.frozen, self._value().dequantize().to(weight.dtype), weight)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedTensor:
        """Return the frozen codes; `weight` is not looked at.

        Raises:
            RuntimeError: some weights are not frozen yet.
        """
        if not self.packs:
            return super().quantized(weight)
        return QuantizedTensor(self.codes.clone(), self.step_sizes().clone(), self.spec)

    def step_sizes(self) -> Tensor:
        """Return the largest levels, float32, shape (n,): powers of two, also in an average of the model."""
        levels = self.set_only(self.scale, DEAD_LAYER_LEVEL)
        return levels if levels is self.scale else levels.abs().log2().round_().exp2_()

    @property
    def holds_codes(self) -> bool:
        """Whether enabled: what is frozen does not follow the weight."""
        return self.enabled

    @torch.no_grad()
    def resume_(self, value: QuantizedTensor) -> None:
        """Take levels and codes of `value`: every weight is frozen."""
        self.check_grid(value, self.scale.numel())
        self.scale.copy_(value.scale)
        self.codes.copy_(value.codes)
        self.frozen.fill_(True)
        self.enabled = True

    def _value(self) -> QuantizedTensor:
        return QuantizedTensor(self.codes, self.step_sizes(), self.spec)

    def _looks_enabled(self) -> bool:
        return bool(self.frozen.any())

    def _n_frozen(self) -> int:
        return int(self._count(self.frozen))

    def _freeze_(self, weight: Tensor, share: float) -> None:
        """Freeze the largest magnitudes of the layer until `share` is frozen; of equal ones the first count."""
        missing = round(share * weight.numel()) - self._n_frozen()
        if missing <= 0:
            return
        magnitude = weight.detach().abs().masked_fill(self.frozen, -1.0).flatten()
        order = magnitude.sort(descending=True, stable=True).indices[:missing]
        chosen = torch.zeros_like(magnitude, dtype=torch.bool)
        chosen[order] = True
        chosen = chosen.reshape(weight.shape)
        self.codes.copy_(torch.where(chosen, power_of_two_codes(weight, self.step_sizes(), self.spec), self.codes))
        self.frozen.logical_or_(chosen)
