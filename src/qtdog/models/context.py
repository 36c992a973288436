"""ARM-CML's context: a channel that says what the images of one domain have in common (Zhang et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from qtdog.core.registry import HyperParameter, HyperParameters
from qtdog.models.feature_layer import FeatureLayer, ImageShape
from qtdog.models.network import Network

KERNEL = 5


class Context(nn.Module):
    """Images to the input of the backbone: the images, and beside them the context of their domain.

    The context c = 1/n Σ_i φ(x_i) is the mean, over the images of a domain, of what a small network φ (three 5 × 5
    convolutions with batch norm and ReLU between them) says of each image at each position. Source: Zhang et al.,
    *Adaptive Risk Minimization* (NeurIPS 2021), contextual meta-learning; φ as in DomainBed's `ContextNet`.

    Its batch norm always learns its statistics: there are no pretrained ones to keep.

    Args:
        channels: of the images.
        n_context: channels of the context.
        width: channels inside.

    Shapes:
        (n, channels, H, W) → (n, channels + n_context, H, W)

    Example:
        >>> context = Context(channels=3, n_context=1, width=4)
        >>> context(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(self, channels: int, n_context: int, width: int) -> None:
        super().__init__()
        widths = [channels, width, width, n_context]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            if index:
                layers += [nn.BatchNorm2d(before), nn.ReLU()]
            layers.append(nn.Conv2d(before, after, KERNEL, padding=KERNEL // 2))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Return the images with their context.

        Args:
            images: shape (n, channels, H, W), domain after domain.
            sizes: images of each domain, adding up to n; default: all are of one domain.
        """
        parts = self.layers(images).split(list(sizes) if sizes else len(images))
        contexts = [part.mean(dim=0, keepdim=True).expand_as(part) for part in parts]
        return torch.cat([images, torch.cat(contexts).to(images.dtype)], dim=1)


class ContextLayer(FeatureLayer):
    """A context network before the backbone (Zhang et al., NeurIPS 2021); ships, and goes with the objective arm.

    The network then answers for a batch: its context is the mean over the images that it is given together.
    """

    HYPERPARAMETERS: ClassVar[HyperParameters] = {
        "channels": HyperParameter(1, "channels of the context", low=1, high=16),
        "width": HyperParameter(64, "channels inside the context network", low=1, high=512),
    }
    SHIPS = True
    LEARNS_STATISTICS = True
    OBJECTIVES = ("arm",)

    @property
    def extra_channels(self) -> int:
        """Channels of the context."""
        return int(self.params["channels"])

    def install_(self, network: Network, image_shape: ImageShape) -> None:
        """Put a context network with a random start before the featurizer."""
        network.context = Context(image_shape[0], self.extra_channels, int(self.params["width"]))
