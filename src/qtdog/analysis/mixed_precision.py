"""Bits per layer under a budget: curvature times rounding error, and an exact multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from qtdog.analysis.hessian import BlockTrace, block_traces
from qtdog.conversion.layers import Layer, find_layers, select_layers
from qtdog.core.config import QuantizerConfig
from qtdog.core.errors import ConfigError
from qtdog.core.quantized import QuantSpec
from qtdog.quantizers.base import OPTION_NAMES, Quantizer, QuantizerOptions
from qtdog.quantizers.registry import QUANTIZERS


def assign_bits(
    costs: npt.NDArray[np.floating], n_weights: Sequence[int], candidates: Sequence[int], budget: float
) -> list[int]:
    """Return the bits of each layer that minimize the sum of the costs, with at most `budget` bits per weight.

    With x_lb = 1 if layer l gets b bits:

        minimize Σ_lb x_lb · costs[l, b]   so that   Σ_b x_lb = 1,   Σ_lb x_lb · n_l · b ≤ budget · Σ_l n_l

    solved exactly as an integer program (HiGHS through SciPy). Where fewer bits cost no more, they are taken.

    Args:
        costs: (layers, candidates), finite.
        n_weights: weights of each layer.
        candidates: bit-widths, in the order of the columns.
        budget: bits per weight, averaged over all weights.

    Raises:
        ConfigError: the budget is below the smallest candidate.

    Example:
        >>> costs = np.array([[9.0, 1.0], [2.0, 1.5]])  # the first layer suffers more from 4 bits
        >>> assign_bits(costs, [100, 100], [4, 8], 6.0)
        [8, 4]
    """
    fewest = min(candidates)
    if budget < fewest:
        raise ConfigError(f"a budget of {budget:g} bits per weight is below the smallest candidate, {fewest} bits")
    n_layers, n_candidates = costs.shape
    unit = math.gcd(*n_weights)
    sizes = np.array(n_weights, dtype=np.float64) / unit
    # Sums of whole numbers: with half a unit to spare the solver's tolerance cannot let a wrong one in.
    room = math.floor(budget * sizes.sum() + 1e-9) + 0.5
    bits = np.array(candidates, dtype=np.float64)
    one_each = np.kron(np.eye(n_layers), np.ones(n_candidates))
    largest = float(np.abs(costs).max()) or 1.0
    result = milp(
        costs.reshape(-1) * (1e4 / largest),  # so that the solver's absolute gap is small beside every cost that counts
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.kron(sizes, bits)[None], -np.inf, room)],
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the integer program has no solution, though one exists: {result.message}")
    chosen = result.x.reshape(costs.shape).argmax(axis=1)
    return [_fewest(row, row[place], candidates) for row, place in zip(costs, chosen, strict=True)]


def _fewest(row: npt.NDArray[np.floating], cost: float, candidates: Sequence[int]) -> int:
    return min(bits for bits, other in zip(candidates, row, strict=True) if other <= cost)


def average_bits(bits: Sequence[int], n_weights: Sequence[int]) -> float:
    """Return bits per weight, averaged over all weights.

    Example:
        >>> average_bits([8, 4], [100, 300])
        5.0
    """
    return sum(b * n for b, n in zip(bits, n_weights, strict=True)) / sum(n_weights)


ALMOST_DONE = 1 - 2.0**-20  # progress at the last step: all that a member rounds step by step is rounded


@dataclass(frozen=True)
class Sensitivity:
    """One weight that is to be quantized.

    Attributes:
        names: of the layer, or of the layers that share the weight.
        curvature: of the float network, at this weight.
        errors: ‖Q(w) - w‖² at each candidate's bits.
    """

    names: tuple[str, ...]
    curvature: BlockTrace
    errors: tuple[float, ...]

    @property
    def costs(self) -> list[float]:
        """Ω of this layer: mean curvature times squared error, for each candidate.

        A curvature that its estimate cannot tell from zero counts as one standard error: else chance would take a layer
        to the fewest bits.
        """
        least = self.curvature.standard_error / self.curvature.n_weights
        return [max(self.curvature.mean, least) * error for error in self.errors]


def sensitivities(
    network: nn.Module,
    losses: Iterable[tuple[Tensor, float]],
    config: QuantizerConfig,
    candidates: Sequence[int],
    *,
    n_vectors: int = 20,
    seed: int = 0,
) -> list[Sensitivity]:
    """Return what rounding each layer is expected to cost at each bit-width.

        Ω_l(b) = tr(H_l) / n_l · ‖Q_b(w_l) - w_l‖²

    Source: HAWQ-V2 (Dong et al., NeurIPS 2020, Eq. 6): the expected rise of the loss to second order, if the rounding
    error of a layer points in no particular direction. Q_b is the quantizer as it starts, before any training on it.

    Args:
        network: the plain float network.
        losses: of `network`, as `analysis.hessian.block_traces` takes them.
        config: quantizer, granularity, and the layers that are quantized.
        candidates: bit-widths.
        n_vectors: random vectors of the trace.
        seed: of the vectors.

    Raises:
        ConfigError: the quantizer has no grid, or a pattern of layers means none.
    """
    shared: dict[int, list[Layer]] = {}
    for layer in select_layers(find_layers(network), config.include, config.exclude):
        shared.setdefault(id(layer.weight), []).append(layer)
    groups = list(shared.values())
    errors = [[rounding_error(group[0], config, bits) for bits in candidates] for group in groups]
    weights = {group[0].name: group[0].weight for group in groups}
    traces = block_traces(weights, losses, n_vectors=n_vectors, seed=seed)
    return [
        Sensitivity(tuple(layer.name for layer in group), traces[group[0].name], tuple(error))
        for group, error in zip(groups, errors, strict=True)
    ]


@torch.no_grad()
def rounding_error(layer: Layer, config: QuantizerConfig, bits: int) -> float:
    """Return ‖Q(w) - w‖², the squared error that the quantizer of `config` makes as it starts.

    Raises:
        ConfigError: the quantizer has no grid.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, -0.25]]))  # LSQ's start: s = 2 · mean|w| = 1.25
        >>> rounding_error(find_layers(linear)[0], QuantizerConfig(exclude=()), 2)  # 1.25 and 0
        0.125
    """
    weight = layer.weight.detach().clone()
    quantizer = quantizer_for(weight, layer.spec(bits, config.granularity), config)
    quantizer.enable_(weight)
    quantizer.begin_step_(weight, seed=0, progress=ALMOST_DONE)
    if not quantizer.packs:
        raise ConfigError(no_grid(config.name))
    return (quantizer.quantized(weight).dequantize() - layer.weight).double().square().sum().item()


def quantizer_for(weight: Tensor, spec: QuantSpec, config: QuantizerConfig) -> Quantizer:
    """Return the quantizer of `config` for one weight, not yet enabled.

    Raises:
        ConfigError: an unknown quantizer.
    """
    options = QuantizerOptions(**{name: getattr(config, name) for name in OPTION_NAMES})
    return QUANTIZERS[config.name].make(weight, spec, options)


def require_grid(config: QuantizerConfig) -> None:
    """Refuse a quantizer that leaves weights in float, so that no number of bits is better than another.

    Raises:
        ConfigError: it has no grid, or there is no quantizer at all.

    Example:
        >>> require_grid(QuantizerConfig(name="lsq"))
    """
    if config.name == "none":
        raise ConfigError(no_grid("none"))
    example = nn.Module()
    example.weight = nn.Parameter(torch.eye(4))
    rounding_error(find_layers(example)[0], config, 4)


def no_grid(name: str) -> str:
    """Return the sentence that says so."""
    return f"quantizer '{name}' leaves the weights in float, so there are no bits to choose; use one such as lsq"


def layer_costs(layers: Sequence[Sensitivity]) -> npt.NDArray[np.float64]:
    """Return the costs as an array (layers, candidates), for `analysis.mixed_precision.assign_bits`."""
    return np.array([layer.costs for layer in layers], dtype=np.float64)
