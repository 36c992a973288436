"""Quantization noise of one layer against the uniform law: pure functions of latent weights and their codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from qtdog.core.errors import ModelError
from qtdog.core.quantized import QuantizedTensor, scale_shape

N_BINS = 100
UNIFORM_LEVELS = ("uniform", "symmetric", "half")
EDGE = 0.5 + 2.0**-10  # the division by the step size rounds


@dataclass(frozen=True)
class Noise:
    """What rounding did to one layer, in units of each weight's own step size.

    Attributes:
        n: weights.
        kl: divergence of the histogram from the uniform law over one step, nats; of the weights inside the grid.
        floor: what `kl` is on average for truly uniform noise of as many weights: (B - 1) / 2n with B bins.
        mean: of the noise inside; 0 if it is symmetric.
        mean_error: standard error that the mean of uniform noise would have, 1 / √(12 n).
        positive_frac: share of the noise inside that is above zero.
        std: of the noise inside; 1/√12 = 0.289 if it is uniform.
        clipped_frac: share of the weights beyond the ends of the grid by more than half a step.
        moved_frac: share inside the grid that is not on its nearest point, as OBC and GPTQ do on purpose.
    """

    n: int
    kl: float
    floor: float
    mean: float
    mean_error: float
    positive_frac: float
    std: float
    clipped_frac: float
    moved_frac: float


def layer_noise(latent: Tensor, value: QuantizedTensor) -> tuple[npt.NDArray[np.float64], float, float]:
    """Return noise (n,), clipped share and moved share: (w_q - w) / s of the weights on their nearest point.

    Source of the question: Javed et al., QT-DoG, ICML 2025, section 3.2: rounding as U(-s/2, s/2).

    Args:
        latent: the weights before rounding, the shape of the codes.
        value: codes and step sizes that ship.

    Raises:
        ModelError: a grid without a common step size (INQ's powers of two): its noise has no unit.

    Example:
        >>> import torch
        >>> from qtdog.core.quantized import QuantSpec
        >>> codes = QuantizedTensor(torch.tensor([[1, 1]], dtype=torch.int8), torch.tensor([2.0]), QuantSpec(2))
        >>> noise, clipped, moved = layer_noise(torch.tensor([[1.5, 9.0]]), codes)
        >>> noise.tolist(), clipped, moved
        ([0.25], 0.5, 0.0)
    """
    spec = value.spec
    if spec.levels not in UNIFORM_LEVELS:
        raise ModelError(f"grid '{spec.levels}' has no common step size, so there is no uniform law to compare with")
    scale = value.scale.double().reshape(scale_shape(latent.ndim, spec.axis))
    place = latent.double() / scale
    noise = value.dequantize().double() / scale - place
    low, high = spec.points()[[0, -1]].tolist()
    clipped = (place < low - EDGE) | (place > high + EDGE)
    moved = ~clipped & (noise.abs() > EDGE)
    kept = noise[~clipped & ~moved].clamp(-0.5, 0.5)
    return kept.flatten().cpu().numpy(), clipped.double().mean().item(), moved.double().mean().item()


def describe(noise: npt.NDArray[np.floating], clipped: float, moved: float, *, bins: int = N_BINS) -> Noise:
    """Return the numbers of noise in [-1/2, 1/2].

    Args:
        noise: in units of the step size, one value or more.
        clipped: share of the weights that lie outside.
        moved: share of the weights that are not on their nearest point.
        bins: of the histogram.

    Raises:
        ModelError: no weight is inside the grid.

    Example:
        >>> even = (np.arange(1000) + 0.5) / 1000 - 0.5
        >>> found = describe(even, 0.0, 0.0)
        >>> round(found.kl, 6), round(found.std, 3), found.positive_frac
        (0.0, 0.289, 0.5)
    """
    n = len(noise)
    if n == 0:
        raise ModelError("no weight lies inside the grid, so there is no noise to describe")
    return Noise(
        n=n,
        kl=kl_to_uniform(noise, bins),
        floor=(bins - 1) / (2 * n),
        mean=float(noise.mean()),
        mean_error=1 / math.sqrt(12 * n),
        positive_frac=float((noise > 0).mean()),
        std=float(noise.std()),
        clipped_frac=clipped,
        moved_frac=moved,
    )


def kl_to_uniform(noise: npt.NDArray[np.floating], bins: int = N_BINS) -> float:
    """Return Σ p log(p · B) over the B bins of a histogram on [-1/2, 1/2], nats: 0 for even counts, log B for one bin.

    Of n truly uniform values it is (B - 1) / 2n on average, not 0.

    Example:
        >>> round(kl_to_uniform(np.zeros(5), 100), 4) == round(math.log(100), 4)
        True
    """
    counts, _ = np.histogram(noise, bins=bins, range=(-0.5, 0.5))
    shares = counts[counts > 0] / counts.sum()
    return float((shares * np.log(shares * bins)).sum())
