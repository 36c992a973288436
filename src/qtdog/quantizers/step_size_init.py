"""Where step sizes start: pure functions from a weight to one step size per channel or layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from qtdog.core.quantized import QuantSpec

# A filter whose start is below this share of its layer's mean is dead: as soon as training moved its weights, a grid
# that fine would clip them all, and without a gradient they would stay where they are.
DEAD_FRAC = 2.0**-20
# The start of a layer that is all zeros; trained layers have steps of this size.
DEAD_LAYER_SCALE = 2.0**-10
# Finer steps, near the end of float32, count as zero: quotients and gradients would lose their digits.
MIN_SCALE = 2.0**-120

# The search of `mse_init`, as multiples of the step of `minmax_init` and of the best of those.
COARSE = tuple(2 ** (1 - k / 8) for k in range(1, 81))
FINE = tuple(2 ** (k / 128) for k in range(-15, 16))
N_EXACT = 4


def initial_scale(weight: Tensor, spec: QuantSpec, init: str = "lsq") -> Tensor:
    """Return the step sizes with which learning starts.

    Whatever the start, a dead filter (its step zero, or next to nothing beside its layer's) gets the mean of the living
    ones; a layer without living filters gets `DEAD_LAYER_SCALE`. No step is so large that a point of the grid leaves
    the range of the weight's type.

    Args:
        weight: any floating-point type, two or more dimensions.
        spec: bits, axis and levels.
        init: `lsq`, `lsq_plus`, `minmax` or `mse`; see the functions of this module.

    Returns:
        Positive finite float32 step sizes, shape (spec.n_scales(weight.shape),).

    Raises:
        KeyError: an unknown `init`; `QuantizerOptions` refuses it first.

    Example:
        >>> initial_scale(torch.tensor([[2.0, -2.0], [0.0, 0.0], [4.0, 4.0]]), QuantSpec(2)).tolist()
        [4.0, 6.0, 8.0]
    """
    rows, unit = _normalized(spec.rows(weight.detach()))
    scale = STEP_SIZE_INITS[init](rows, spec)
    alive = (scale > scale.mean() * DEAD_FRAC) & (scale * unit >= MIN_SCALE)
    if not alive.any():
        return torch.full_like(scale, DEAD_LAYER_SCALE)
    living = torch.where(alive, scale, scale[alive].mean())
    return (living * unit).clamp(max=largest_scale(weight.dtype, spec))


def lsq_init(rows: Tensor, spec: QuantSpec) -> Tensor:
    """Return 2 · mean|w| / sqrt(Qp) of each row (Esser et al., ICLR 2020, section 2.1).

    Args:
        rows: the weights that share a step size, shape (n, k).
        spec: bits and levels.

    Returns:
        Step sizes, shape (n,), zero for a row of zeros.

    Example:
        >>> lsq_init(torch.tensor([[1.0, -3.0]]), QuantSpec(2)).tolist()
        [4.0]
    """
    return rows.abs().mean(dim=1) * (2 / math.sqrt(spec.qmax))


def lsq_plus_init(rows: Tensor, spec: QuantSpec) -> Tensor:
    """Return max(|μ - 3σ|, |μ + 3σ|) / 2^(b-1) of each row (Bhalgat et al., CVPR Workshops 2020, section 3.3).

    σ is that of the row itself (divided by k, not k - 1), so that a row of one weight has a start.

    Args:
        rows: the weights that share a step size, shape (n, k).
        spec: bits and levels.

    Returns:
        Step sizes, shape (n,), zero for a row of zeros.

    Example:
        >>> lsq_plus_init(torch.tensor([[1.0, 3.0]]), QuantSpec(2)).tolist()  # μ = 2, σ = 1
        [2.5]
    """
    deviation, mean = torch.std_mean(rows, dim=1, correction=0)
    return (mean.abs() + 3 * deviation) / 2 ** (spec.bits - 1)


def minmax_init(rows: Tensor, spec: QuantSpec) -> Tensor:
    """Return the smallest step size of each row that clips nothing: max(max w / high, min w / low).

    Low and high are the ends of the unit grid (-2^(b-1) and 2^(b-1) - 1 for uniform levels). The largest weight then
    lies on an end of the grid, where LSQ gives it no gradient.

    Args:
        rows: the weights that share a step size, shape (n, k).
        spec: bits and levels.

    Returns:
        Step sizes, shape (n,), zero for a row of zeros.

    Example:
        >>> minmax_init(torch.tensor([[1.0, -3.0], [2.0, -3.0]]), QuantSpec(2)).tolist()
        [1.5, 2.0]
    """
    low, high = _ends(spec)
    return torch.maximum(rows.amax(dim=1) / high, rows.amin(dim=1) / low)


def mse_init(rows: Tensor, spec: QuantSpec) -> Tensor:
    """Return the step size of each row with the smallest squared error Σ (w - s · clamp(round(w / s)))².

    A deterministic search in three stages. First 80 multiples 2^(k/8) of the step of `minmax_init`, downwards from
    just below 2: from 2 on, half the step clips nothing either and is never worse. Then 31 multiples 2^(k/128) of the
    best, up to its neighbours. Then four times s = Σ w·c / Σ c², the best step for given codes c. The error has many
    local minima, most of all for few weights and many bits, where the result can lie above the smallest one.

    Args:
        rows: the weights that share a step size, shape (n, k).
        spec: bits and levels, uniform or symmetric.

    Returns:
        Step sizes, shape (n,), zero for a row of zeros.

    Example:
        >>> mse_init(torch.tensor([[1.0, 1.0, -2.0]]), QuantSpec(2)).tolist()
        [1.0]
    """
    widest = minmax_init(rows, spec)
    rows = rows / widest.where(widest > 0, 1.0)[:, None]
    best = torch.ones_like(widest)
    best = _least(rows, spec, best, (best * multiple for multiple in COARSE))
    best = _least(rows, spec, best, (best * multiple for multiple in FINE))
    for _ in range(N_EXACT):
        best = _least(rows, spec, best, [_exact(rows, best, spec)])
    return best * widest


STEP_SIZE_INITS: dict[str, Callable[[Tensor, QuantSpec], Tensor]] = {
    "lsq": lsq_init,
    "lsq_plus": lsq_plus_init,
    "minmax": minmax_init,
    "mse": mse_init,
}


def largest_scale(dtype: torch.dtype, spec: QuantSpec) -> float:
    """Return a step size with which every point of the grid is finite in `dtype` and in float32, with a factor 2 left.

    Example:
        >>> largest_scale(torch.float16, QuantSpec(4))
        4094.0
    """
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / 2**spec.bits


def _normalized(rows: Tensor) -> tuple[Tensor, float]:
    """Return the rows in float32, divided by a power of two that brings the largest near 1, and that power.

    Exact, and sums of squares can neither overflow nor vanish.
    """
    exponent = math.frexp(rows.abs().amax().item())[1]
    unit = 2.0 ** min(max(exponent, -120), 120)
    return rows.float() / unit, unit


def _least(rows: Tensor, spec: QuantSpec, start: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """Return, row by row, the step size with the smallest error among `start` and the candidates."""
    best, error = start, _squared_error(rows, start, spec)
    for scale in candidates:
        found = _squared_error(rows, scale, spec)
        better = found < error
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    return best


def _squared_error(rows: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    step = scale[:, None]
    return (rows / step).round_().clamp_(spec.qmin, spec.qmax).mul_(step).sub_(rows).square_().sum(dim=1)


def _exact(rows: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return Σ w·c / Σ c² of each row for its codes c under `scale`; `scale` where all codes are zero."""
    codes = (rows / scale[:, None]).round_().clamp_(spec.qmin, spec.qmax)
    squares = codes.square().sum(dim=1)
    return torch.where(squares > 0, (rows * codes).sum(dim=1) / squares, scale)


def _ends(spec: QuantSpec) -> tuple[float, float]:
    """Return the lowest and the highest point of the unit grid."""
    if spec.levels == "power_of_two":
        return -1.0, 1.0
    half = 0.5 if spec.levels == "half" else 0.0
    return spec.qmin + half, spec.qmax + half
