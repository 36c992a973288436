"""What a feature layer is: something that a method puts into the network itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from qtdog.core.registry import HyperParameters, Value, fill
from qtdog.models.network import Network

ImageShape = tuple[int, int, int]
"""Channels, height and width."""


class FeatureLayer(ABC):
    """A change of the network that works with any objective, quantizer and averager; abstract.

    Raises:
        ConfigError: an unknown hyper-parameter, or a value out of range.

    Attributes:
        HYPERPARAMETERS: name → default, search range, meaning.
        SHIPS: whether the network that ships has it too, so that a file is loaded with it.
        LEARNS_STATISTICS: whether it brings batch norm of its own, whose statistics are never frozen.
        OBJECTIVES: the only objectives that it makes sense with; empty for any.
        extra_channels: how many channels the featurizer takes besides those of the images.
        params: the values of the hyper-parameters.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {}
    SHIPS: ClassVar[bool] = False
    LEARNS_STATISTICS: ClassVar[bool] = False
    OBJECTIVES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str, params: Mapping[str, Value]) -> None:
        self.params = fill(f"feature layer '{name}'", self.HYPERPARAMETERS, params)

    @property
    def extra_channels(self) -> int:
        """Channels that the featurizer takes besides those of the images."""
        return 0

    @abstractmethod
    def install_(self, network: Network, image_shape: ImageShape) -> None:
        """Put the layer into a network that takes images of `image_shape`, in place.

        Random starts come from torch's global state, which the caller seeds.

        Raises:
            ModelError: the network has no place for it.
        """


class NoFeatureLayer(FeatureLayer):
    """The backbone as it is."""

    def install_(self, network: Network, image_shape: ImageShape) -> None:
        """Do nothing."""
