"""What the quantizer does to each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtdog.conversion.attach import sites
from qtdog.conversion.health import clipped_frac
from qtdog.quantizers.base import Quantizer


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
