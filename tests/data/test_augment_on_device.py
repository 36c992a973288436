"""Images augmented in whole batches of tensors are those that are augmented one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qtdog.data.augment import augment, draw_parameters
from qtdog.data.augment_on_device import augment_on_device, crop_flip, resize_weights
from qtdog.data.augment_policies import crop_and_flip

N = 60
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def pictures(size: int, channels: int) -> torch.Tensor:
    """Smooth structure with edges and noise: uint8 (N, size, size, channels)."""
    generator = torch.Generator().manual_seed(size)
    coarse = torch.rand((N, channels, 6, 6), generator=generator) * 255
    fine = torch.randn((N, channels, size, size), generator=generator) * 20
    smooth = F.interpolate(coarse, size=(size, size), mode="nearest")
    return (smooth + fine).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_rows_of_weights_are_those_of_torch():
    """One column resized by the weights is the column that torch resizes, for larger and smaller crops."""
    column = torch.rand(40, generator=torch.Generator().manual_seed(0))
    for start, length, size in ((0, 40, 17), (3, 20, 20), (5, 9, 30), (39, 1, 4)):
        image = column[start : start + length, None].repeat(1, 4)  # torch takes the mean of an image of one column
        expected = F.interpolate(image[None, None], size=(size, 4), mode="bilinear", antialias=True)[0, 0, :, 0]
        weights = resize_weights(torch.tensor([float(start)]), torch.tensor([float(length)]), 40, size)[0]
        assert torch.allclose(weights @ column, expected, atol=1e-5)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_flips_differ_by_rounding_alone(size: int, channels: int):
    images, drawn = pictures(size, channels), draw_parameters(torch.Generator().manual_seed(1), N, size)
    expected = crop_and_flip(images, drawn, size).permute(0, 2, 3, 1).float()
    off = (crop_flip(images, drawn, size) - expected).abs()
    assert off.max() <= 2
    assert (off > 0).float().mean() < 0.03


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_jitter_is_that_of_single_images(size: int, channels: int):
    """Every image has its own factors, in its own order; with crops made the same way nothing differs but rounding."""
    images, drawn = pictures(size, channels), draw_parameters(torch.Generator().manual_seed(1), N, size)
    assert len(set(map(tuple, drawn.order.tolist()))) > 15
    assert drawn.grey.any()
    options = {"size": size, "mean": MEAN[:channels], "std": STD[:channels]}
    expected = augment(images, drawn, **options)
    crops = crop_and_flip(images, drawn, size).permute(0, 2, 3, 1)
    made = augment_on_device(crops, drawn, crops_made=True, **options)
    assert torch.allclose(made, expected, atol=1e-4)
    assert made.is_contiguous(memory_format=torch.channels_last)
    scale = torch.tensor(STD[:channels])[:, None, None] * 255
    off = (augment_on_device(images, drawn, **options) - expected).abs() * scale
    assert off.mean() < 0.05
    assert (off > 2.5).float().mean() < 0.001
