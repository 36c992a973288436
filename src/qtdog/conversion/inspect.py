"""What the quantizer does to each layer: report, health of the grid while it trains, size of the file to come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import Site, sites
from qtdog.conversion.layers import find_layers, select_layers
from qtdog.core.quantized import QuantizedTensor
from qtdog.quantizers.base import Quantizer

# A layer beyond one of these is worth a warning. At 2 bits LSQ's start clips about 6 % of Gaussian weights, and good
# runs move their step sizes by some percent; pretrained networks bring dead filters (12 % of the first convolution of
# tf_efficientnet_lite0): these are far outside of all that.
MAX_CLIPPED_FRAC = 0.3
MAX_DEAD_FRAC = 0.5
MAX_STEP_CHANGE = 3.0


@dataclass(frozen=True)
class LayerHealth:
    """One layer's grid at one moment.

    Attributes:
        name: of the layer.
        clipped_frac: share of the weights on or beyond the ends of the grid, if those get no gradient; else 0.
        dead_frac: share of the channels whose codes are all zero although their weights are not.
        step_change: median over the channels of step size / step size at the start; None if steps do not move.
    """

    name: str
    clipped_frac: float
    dead_frac: float
    step_change: float | None

    @property
    def problems(self) -> list[str]:
        """What is worth a warning, in words; empty for a healthy layer."""
        found = []
        if self.clipped_frac > MAX_CLIPPED_FRAC:
            found.append(f"{self.clipped_frac:.0%} of its weights are clipped")
        if self.dead_frac > MAX_DEAD_FRAC:
            found.append(f"{self.dead_frac:.0%} of its channels round to zero")
        if self.step_change is not None and not 1 / MAX_STEP_CHANGE <= self.step_change <= MAX_STEP_CHANGE:
            found.append(f"its step sizes are {self.step_change:.3g} times what they started from (median)")
        return found


@torch.no_grad()
def layer_health(model: nn.Module) -> list[LayerHealth]:
    """Return the health of each layer that lies on a grid, in the order of the model.

    Example:
        >>> from qtdog.conversion.attach import attach
        >>> model = nn.Linear(4, 2, bias=False)
        >>> attach(model, bits=7).enable()
        >>> [(layer.dead_frac, layer.step_change, layer.problems) for layer in layer_health(model)]
        [(0.0, 1.0, [])]
    """
    return [_health(site) for site in sites(model) if site.quantizer.packs]


def _health(site: Site) -> LayerHealth:
    value = site.quantizer.quantized(site.weight)
    change = site.quantizer.step_change()
    return LayerHealth(
        name=site.name,
        clipped_frac=clipped_frac(site.weight, value) if site.quantizer.CLIPS else 0.0,
        dead_frac=_dead_frac(site.weight, value),
        step_change=None if change is None else change.median().item(),
    )


def clipped_frac(weight: Tensor, value: QuantizedTensor) -> float:
    """Return the share of the weights on or beyond the ends of the grid.

    Example:
        >>> from qtdog.core.quantized import QuantSpec
        >>> from qtdog.quantizers.base import encode
        >>> weight = torch.tensor([[0.1, -0.1, 9.0, 0.2]])
        >>> clipped_frac(weight, encode(weight, torch.tensor([0.1]), QuantSpec(4)))
        0.25
    """
    spec = value.spec
    ratio = weight.float() / spec.spread(value.scale, weight.shape)
    low, high = spec.points()[[0, -1]].tolist()
    return ((ratio <= low) | (ratio >= high)).float().mean().item()


def _dead_frac(weight: Tensor, value: QuantizedTensor) -> float:
    codes, weights = value.spec.rows(value.codes), value.spec.rows(weight)
    dead = (codes == 0).all(1) & (weights != 0).any(1)
    return dead.float().mean().item()


def worst(layers: Sequence[LayerHealth]) -> dict[str, float]:
    """Return the worst value of each kind over all layers, for a line of metrics; empty without layers.

    Example:
        >>> worst([LayerHealth("a", 0.1, 0.0, 0.5), LayerHealth("b", 0.2, 0.0, 1.5)])
        {'clipped_frac': 0.2, 'dead_frac': 0.0, 'step_change_min': 0.5, 'step_change_max': 1.5}
    """
    if not layers:
        return {}
    changes = [layer.step_change for layer in layers if layer.step_change is not None]
    table = {
        "clipped_frac": max(layer.clipped_frac for layer in layers),
        "dead_frac": max(layer.dead_frac for layer in layers),
    }
    return table | ({"step_change_min": min(changes), "step_change_max": max(changes)} if changes else {})


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: of the layer.
        shape: of the weight.
        bits: per weight.
        n_weights: weights in the layer.
        step_size_mean: mean step size.
        clipped_frac: share of the weights on or beyond the ends of the grid, if those get no gradient; else 0.
        codes_used: how many different codes occur, of 2^bits.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    n_weights: int
    step_size_mean: float
    clipped_frac: float
    codes_used: int


@torch.no_grad()
def layer_report(model: nn.Module) -> list[LayerReport]:
    """Return one report per layer that has codes, in the order of the model; none before the quantizers are enabled.

    Example:
        >>> from qtdog.conversion.attach import attach
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.5, -0.5]]))
        >>> attach(model, bits=2).enable()
        >>> layer_report(model)[0].step_size_mean
        1.0
    """
    return [_report(site.name, site.quantizer, site.weight) for site in sites(model) if site.quantizer.packs]


def _report(name: str, quantizer: Quantizer, weight: Tensor) -> LayerReport:
    value = quantizer.quantized(weight)
    spec = value.spec
    return LayerReport(
        name=name,
        shape=tuple(weight.shape),
        bits=spec.bits,
        n_weights=weight.numel(),
        step_size_mean=value.scale.mean().item(),
        clipped_frac=clipped_frac(weight, value) if quantizer.CLIPS else 0.0,
        codes_used=value.codes.unique().numel(),
    )


FLOAT_BYTES = 4


@dataclass(frozen=True)
class SizeEstimate:
    """The tensors of a model. Its file has a header on top (some kB), and codes that entropy coding makes smaller.

    Attributes:
        n_parameters: that train, before quantizers are attached.
        float32_bytes: of all tensors in float32.
        packed_bytes: with codes of n bits and one float32 step size per output channel for the selected layers.
    """

    n_parameters: int
    float32_bytes: int
    packed_bytes: int


def estimate_size(model: nn.Module, *, bits: int, exclude: Sequence[str] = ("classifier",)) -> SizeEstimate:
    """Return the size of the file that `model` will have, without computing anything: a model on "meta" will do.

    Args:
        model: plain, without quantizers.
        bits: per quantized weight.
        exclude: glob patterns of layers that stay in float.

    Raises:
        ConfigError: as in `conversion.layers.select_layers`.

    Example:
        >>> model = nn.ModuleDict({"featurizer": nn.Linear(80, 10), "classifier": nn.Linear(10, 2)})
        >>> estimate_size(model, bits=7)  # 800 · 7 bits, 10 step sizes, 32 floats
        SizeEstimate(n_parameters=832, float32_bytes=3328, packed_bytes=868)
    """
    layers = {id(layer.weight): layer for layer in select_layers(find_layers(model), exclude=exclude)}
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # a tied one counts once
    float32_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    saved = 0
    for layer in layers.values():
        n_weights, n_steps = layer.weight.numel(), layer.spec(bits, "channel").n_scales(layer.weight.shape)
        saved += FLOAT_BYTES * (n_weights - n_steps) - math.ceil(n_weights * bits / 8)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return SizeEstimate(n_parameters, float32_bytes, float32_bytes - saved)
