"""A linear probe first: at the beginning of a run only the classifier trains."""

from __future__ import annotations

from itertools import chain

from torch import nn

from qtdog.models.network import Network


def keep_classifier_gradients_(network: Network, objective: nn.Module) -> None:
    """Drop every gradient but the classifier's.

    An optimizer leaves a parameter without a gradient alone: no decay, no momentum, no moments gathered. So a random
    classifier fits the pretrained features before they move (Kumar et al., ICLR 2022; DiWA, Rame et al., NeurIPS 2022,
    and ERM++, Teterwak et al., 2023, begin so).

    Example:
        >>> import torch
        >>> network = Network(nn.Linear(3, 2), nn.Linear(2, 2), freeze_bn=True)
        >>> network(torch.ones(1, 3)).sum().backward()
        >>> keep_classifier_gradients_(network, nn.Identity())
        >>> network.featurizer.weight.grad is None, network.classifier.weight.grad is None
        (True, False)
    """
    kept = {id(parameter) for parameter in network.classifier.parameters()}
    for parameter in chain(network.parameters(), objective.parameters()):
        if id(parameter) not in kept:
            parameter.grad = None
