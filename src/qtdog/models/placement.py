"""Putting a network where it computes."""

from __future__ import annotations

import torch

from qtdog.models.network import Network


def place_(network: Network, device: torch.device) -> Network:
    """Move a network to `device` in channels-last memory, in place, and return it.

    Training and loading both go through here: with another memory format a convolution takes other kernels, and the
    last bits of the logits differ.

    Example:
        >>> from torch import nn
        >>> network = Network(nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten()), nn.Linear(8, 2), freeze_bn=True)
        >>> place_(network, torch.device("cpu")).featurizer[0].weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    network.to(device)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return network
