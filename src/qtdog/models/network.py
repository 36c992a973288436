"""A featurizer and a linear head: the one shape that every model of the project has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_batch_norm_(module: nn.Module) -> None:
    """Put every batch-norm layer inside `module` into evaluation mode, in place.

    In that mode a layer computes y = γ · (x - μ) / √(σ² + ε) + β with the stored statistics μ and σ² and does not
    update them; γ and β stay trainable. Small batches from several domains would spoil the pretrained statistics
    (protocol: DomainBed's `ResNet` featurizer).

    Example:
        >>> layer = nn.BatchNorm2d(3)
        >>> freeze_batch_norm_(layer)
        >>> layer.training, layer.weight.requires_grad
        (False, True)
    """
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.eval()


class Network(nn.Module):
    """Featurizer followed by a linear classifier.

    Attributes:
        featurizer: maps images (n, channels, size, size) to features (n, d).
        classifier: maps features (n, d) to logits (n, n_classes).
        context: maps images to what the featurizer takes, with the sizes of the domains that they come from; None for
            the images themselves.
        freeze_bn: whether `train()` leaves the statistics of the featurizer's batch norm alone.
        pretraining: where the featurizer's weights come from, in words; "none" for a random start.

    Example:
        >>> import torch
        >>> network = Network(nn.Flatten(), nn.Linear(12, 5), freeze_bn=True)
        >>> network(torch.zeros(2, 3, 2, 2)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, featurizer: nn.Module, classifier: nn.Linear, *, freeze_bn: bool, pretraining: str = "none"
    ) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.classifier = classifier
        self.context: nn.Module | None = None
        self.freeze_bn = freeze_bn
        self.pretraining = pretraining
        self.train()

    def features(self, images: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Return the features (n, d) of images (n, channels, size, size).

        Args:
            images: domain after domain, if there is a context.
            sizes: images of each domain, for the context; default: all are of one domain.
        """
        return self.featurizer(images if self.context is None else self.context(images, sizes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, n_classes) of images (n, channels, size, size)."""
        return self.classifier(self.features(images))

    def train(self, mode: bool = True) -> Self:
        """Set training mode (or evaluation mode) everywhere but in frozen batch-norm layers of the featurizer."""
        super().train(mode)
        if self.freeze_bn:
            freeze_batch_norm_(self.featurizer)
        return self


def to_device_(network: Network, device: torch.device) -> Network:
    """Move a network to `device` in channels-last memory, in place, and return it.

    Training and loading both go through here: with another memory format a convolution takes other kernels, and the
    last bits of the logits differ.

    Example:
        >>> from torch import nn
        >>> network = Network(nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten()), nn.Linear(8, 2), freeze_bn=True)
        >>> weight = to_device_(network, torch.device("cpu")).featurizer[0].weight
        >>> weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    network.to(device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return network
