"""How much arithmetic a network takes, counted without computing anything."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from qtdog.core.errors import ModelError
from qtdog.models.backbones import create_network
from qtdog.models.text_backbones import TEXT_BACKBONES

BACKWARD = 2  # the backward pass takes about twice the forward pass: once for the inputs, once for the weights


def training_flops(backbone: str, *, channels: int, size: int) -> float:
    """Return the floating-point operations of a forward and backward pass over one image or text.

    A multiplication and an addition count as two. Of a transformer for text, 2 operations per weight and token are
    assumed, its word table left out.

    Args:
        backbone: a name in `models.backbones.backbone_names()`.
        channels: of the images.
        size: height and width of the images in pixels, or tokens of a text.

    Raises:
        ModelError: the backbone is unknown, cannot take such images, or cannot be built without memory.

    Example:
        >>> round(training_flops("resnet50", channels=3, size=224) / 1e9, 1)
        24.5
    """
    with torch.device("meta"):
        network = create_network(
            backbone, n_classes=1, channels=channels, image_size=size, weights="none", freeze_bn=True, seed=0
        )
    if backbone in TEXT_BACKBONES:
        n_weights = sum(p.numel() for name, p in network.named_parameters() if "embeddings" not in name)
        return (1 + BACKWARD) * 2.0 * n_weights * size
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            network.eval()(torch.zeros(1, channels, size, size, device="meta"))
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(f"the arithmetic of '{backbone}' cannot be counted: {error}") from error
    return (1.0 + BACKWARD) * counter.get_total_flops()
