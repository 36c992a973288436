"""Feature maps inside a network: hooks on its stages, and channel statistics (style)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtdog.core.quantized import scale_shape


@dataclass(frozen=True)
class Stage:
    """A module of a network whose output is a feature map, and the layout of that map.

    Attributes:
        name: of the module in the network, like `featurizer.layer1`.
        n_channels: C.
        axis: the dimension of the channels: 1 for (n, C, H, W), 3 for (n, H, W, C), 2 for tokens (n, T, C).
        ndim: dimensions of the map, 3 or 4.

    Example:
        >>> Stage("featurizer.blocks.2", 192, axis=2, ndim=3).positions
        (1,)
    """

    name: str
    n_channels: int
    axis: int
    ndim: int

    @property
    def positions(self) -> tuple[int, ...]:
        """The dimensions that are neither that of the images nor that of the channels."""
        return tuple(dim for dim in range(1, self.ndim) if dim != self.axis)

    def spread(self, values: Tensor) -> Tensor:
        """Return one value per channel, shape (C,), in a shape that broadcasts over the map."""
        return values.reshape(scale_shape(self.ndim, self.axis))


EPS = 1e-6  # added to the variance, so that a channel that is constant has a style too


class Style(NamedTuple):
    """Mean and standard deviation, each of a shape that broadcasts over the features."""

    mean: Tensor
    std: Tensor


def style(features: Tensor, dims: Sequence[int]) -> Style:
    """Return the style over the dimensions `dims`: μ = mean(x), σ = √(mean((x - μ)²) + 1e-6).

    Computed in float32 at least. The variance is the population's, so that a single position gives no NaN.

    Example:
        >>> mean, std = style(torch.tensor([[1.0, 3.0]]), [1])
        >>> mean.item(), round(std.item(), 4)
        (2.0, 1.0)
    """
    values = features.to(torch.promote_types(features.dtype, torch.float32))
    var, mean = torch.var_mean(values, dim=list(dims), correction=0, keepdim=True)
    return Style(mean, (var + EPS).sqrt())


def restyle(features: Tensor, old: Style, new: Style) -> Tensor:
    """Return the features with another style: σ' · (x - μ) / σ + μ', in the type of `features`.

    Example:
        >>> features = torch.tensor([[1.0, 3.0]])
        >>> old = style(features, [1])
        >>> restyle(features, old, Style(old.mean + 10, 2 * old.std))
        tensor([[10., 14.]])
    """
    gain = new.std / old.std
    return (features * gain + (new.mean - old.mean * gain)).to(features.dtype)
