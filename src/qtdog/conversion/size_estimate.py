"""How large a model's file will be, from the shapes of its weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qtdog.conversion.select import find_layers, select

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
        ConfigError: as in `conversion.select.select`.

    Example:
        >>> model = nn.ModuleDict({"featurizer": nn.Linear(80, 10), "classifier": nn.Linear(10, 2)})
        >>> estimate_size(model, bits=7)  # 800 · 7 bits, 10 step sizes, 32 floats
        SizeEstimate(n_parameters=832, float32_bytes=3328, packed_bytes=868)
    """
    layers = {id(layer.weight): layer for layer in select(find_layers(model), exclude=exclude)}
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # a tied one counts once
    float32_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    saved = 0
    for layer in layers.values():
        n_weights, n_steps = layer.weight.numel(), layer.weight.shape[layer.axis]
        saved += FLOAT_BYTES * (n_weights - n_steps) - math.ceil(n_weights * bits / 8)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return SizeEstimate(n_parameters, float32_bytes, float32_bytes - saved)
