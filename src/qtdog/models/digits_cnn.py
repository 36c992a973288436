"""The small convolutional network for 28 × 28 digits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

GROUPS = 8
# DomainBed's network, and the same at a quarter of the width for machines without an accelerator
WIDTHS = {"mnist_cnn": (64, 128, 128, 128), "digits_cnn": (16, 32, 32, 32)}


def digits_cnn(widths: Sequence[int], *, channels: int) -> nn.Sequential:
    """Return the featurizer: four times 3 × 3 convolution, ReLU, group norm; then the mean over all positions.

    Architecture of `MNIST_CNN` in DomainBed (Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR
    2021, appendix D.1), whose widths are 64, 128, 128, 128: the second convolution has stride 2, the group norms have 8
    groups and come after the ReLU.

    Args:
        widths: channels of the four convolutions, each divisible by 8.
        channels: channels of the images.

    Shapes:
        (n, channels, size, size) → (n, widths[-1])

    Raises:
        ValueError: a width is not divisible by 8 (raised by `torch.nn.GroupNorm`).

    Example:
        >>> import torch
        >>> digits_cnn(WIDTHS["mnist_cnn"], channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 128])
    """
    layers: list[nn.Module] = []
    before = channels
    for index, width in enumerate(widths):
        stride = 2 if index == 1 else 1
        layers += [nn.Conv2d(before, width, 3, stride, padding=1), nn.ReLU(inplace=True), nn.GroupNorm(GROUPS, width)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
