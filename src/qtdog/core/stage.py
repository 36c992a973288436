"""A place inside a network behind which there is a feature map."""

from __future__ import annotations

from dataclasses import dataclass

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
