"""Common corruptions of images, at five severities: how a model does under noise, blur, weather or compression.

Source: Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*,
ICLR 2019. Families and strengths are theirs (ImageNet-C). Lengths (the radius of a blur, say) are theirs at 224 pixels
and scale with the image, so that a severity looks alike at every size. Frost and glass blur are left out: frost needs
their photographs, glass blur moves single pixels one after another. Fog, snow and elastic are drawn with our own noise:
their strengths are near the published ones but not equal to them.

A corruption is a study tool. It is never part of training.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qtdog.core.errors import ConfigError
from qtdog.core.random import torch_stream
from qtdog.core.registry import Registry
from qtdog.data.augment import CPU, BufferPool, normalize, upload
from qtdog.data.decoded_cache import DecodedCache, Indices, InputCache

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_SIZE = 224
"""Image size, in pixels, at which the published lengths hold."""

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
"""One image (C, H, W) in [0, 1], a severity of 1 to 5 and a random stream → the corrupted image, not yet clamped."""

CORRUPTIONS: Registry[Corruption] = Registry("corruption")
FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur"),
    "weather": ("fog", "snow", "brightness"),
    "digital": ("contrast", "pixelate", "elastic"),
    "jpeg": ("jpeg",),
}


def corruption_names(asked: Sequence[str]) -> list[str]:
    """Return the corruptions that names of corruptions and families mean, in a fixed order; all of them for "all".

    Raises:
        ConfigError: an unknown name, with the nearest one.

    Example:
        >>> corruption_names(["jpeg", "noise"])
        ['gaussian_noise', 'shot_noise', 'impulse_noise', 'jpeg']
    """
    ordered = [name for family in FAMILIES.values() for name in family]
    wanted: set[str] = set()
    for name in asked:
        if name == "all":
            wanted.update(ordered)
        elif name in FAMILIES:
            wanted.update(FAMILIES[name])
        else:
            CORRUPTIONS[name]  # raises, with the nearest match
            wanted.add(name)
    return [name for name in ordered if name in wanted]


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0, keys: Sequence[int]) -> Tensor:
    """Return corrupted copies of images; an image gets the same corruption in whatever batch it comes.

    Args:
        images: uint8 (n, C, H, W).
        name: of `CORRUPTIONS`.
        severity: 1 (mild) to 5 (strong).
        seed: of all random draws.
        keys: what names each image in its data set; with `seed`, `name` and `severity` it decides the random draws.

    Returns:
        uint8 (n, C, H, W), on the CPU.

    Raises:
        ConfigError: an unknown corruption, or a severity that there is not.

    Example:
        >>> images = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
        >>> noisy = corrupt(images, "gaussian_noise", 3, keys=[7, 8])
        >>> noisy.shape, bool((noisy[0] == noisy[1]).all())
        (torch.Size([2, 3, 32, 32]), False)
    """
    if severity not in SEVERITIES:
        raise ConfigError(f"there is no severity {severity}: give 1 (mild) to 5 (strong)")
    function = CORRUPTIONS[name]
    corrupted = torch.empty(images.shape, dtype=torch.uint8)
    for row, key in enumerate(keys):
        generator = torch_stream(seed, "corruption", name, severity, int(key))
        one = function(images[row].cpu().to(torch.float32) / 255, severity, generator)
        corrupted[row] = (one.clamp(0, 1) * 255).round().to(torch.uint8)
    return corrupted


class CorruptedCache(InputCache):
    """The images of a cache, corrupted whenever they are read; the position of an image is its key.

    Args:
        cache: decoded images.
        name: of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of all random draws.
    """

    def __init__(self, cache: DecodedCache, name: str, severity: int, seed: int = 0) -> None:
        self.cache, self.name, self.severity, self.seed = cache, name, severity, seed

    def __len__(self) -> int:
        """Return the number of images n."""
        return len(self.cache)

    def gather(self, indices: Indices, pool: BufferPool | None = None) -> Tensor:
        """Return the corrupted images at `indices`, uint8 (b, size, size, C), as the cache has them."""
        images = self.cache.gather(indices, pool).permute(0, 3, 1, 2)
        changed = corrupt(images, self.name, self.severity, seed=self.seed, keys=[int(index) for index in indices])
        return changed.permute(0, 2, 3, 1)

    def network_inputs(
        self, indices: Indices, mean: Sequence[float], std: Sequence[float], device: torch.device = CPU
    ) -> Tensor:
        """Return them normalized, float32 (b, C, size, size) in channels-last memory."""
        return normalize(upload(self.gather(indices), device), mean, std)


def _scaled(image: Tensor, length: float) -> float:
    """Return a published length, in pixels at 224, in pixels of this image."""
    return length * min(image.shape[-2:]) / REFERENCE_SIZE


@CORRUPTIONS.register("gaussian_noise")
def gaussian_noise(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """X + N(0, c²), c = 0.08 ... 0.38 of the range of values: a sensor in low light."""
    c = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return image + c * torch.randn(image.shape, generator=generator)


@CORRUPTIONS.register("shot_noise")
def shot_noise(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Poisson(c x) / c, c = 60 ... 3: the count of photons."""
    c = (60.0, 25.0, 12.0, 5.0, 3.0)[severity - 1]
    return torch.poisson(image * c, generator=generator) / c


@CORRUPTIONS.register("impulse_noise")
def impulse_noise(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A share of 3 % ... 27 % of the values becomes 0 or 1: bit errors."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    draw = torch.rand(image.shape, generator=generator)
    return torch.where(draw < share / 2, 0.0, torch.where(draw < share, 1.0, image))


def _convolved(image: Tensor, kernel: Tensor) -> Tensor:
    """Return the image convolved with a kernel (k, k) whose sum is 1, its border repeated."""
    pad_h, pad_w = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(image[None], (pad_w, pad_w, pad_h, pad_h), mode="replicate")
    weight = kernel.expand(image.shape[0], 1, *kernel.shape)
    return F.conv2d(padded, weight, groups=image.shape[0])[0]


def _gaussian_kernel(sigma: float) -> Tensor:
    radius = max(1, math.ceil(3 * sigma))
    line = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float32) ** 2) / (2 * sigma**2))
    line = line / line.sum()
    return line[:, None] * line[None, :]


@CORRUPTIONS.register("gaussian_blur")
def gaussian_blur(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A Gaussian of sigma 1 ... 6 pixels at 224."""
    return _convolved(image, _gaussian_kernel(max(_scaled(image, (1, 2, 3, 4, 6)[severity - 1]), 0.1)))


@CORRUPTIONS.register("defocus_blur")
def defocus_blur(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A disk of radius 3 ... 10 pixels at 224, its edge smoothed: a lens out of focus."""
    radius = _scaled(image, (3, 4, 6, 8, 10)[severity - 1])
    reach = max(1, math.ceil(radius))
    axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
    distance = torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    disk = (radius + 0.5 - distance).clamp(0, 1)
    return _convolved(image, disk / disk.sum())


def _motion_kernel(length: float, sigma: float, angle: float) -> Tensor:
    """Return the kernel of a movement along a line at `angle` (radians), falling off with `sigma` pixels."""
    reach = max(1, math.ceil(length))
    kernel = torch.zeros(2 * reach + 1, 2 * reach + 1)
    n_samples = 4 * reach + 1
    for t in torch.linspace(0, length, n_samples).tolist():
        row, column = reach + t * math.sin(angle), reach + t * math.cos(angle)
        r, c = math.floor(row), math.floor(column)
        weight = math.exp(-(t**2) / (2 * sigma**2))
        for dr, dc in ((0, 0), (0, 1), (1, 0), (1, 1)):
            share = (1 - abs(row - r - dr)) * (1 - abs(column - c - dc))
            if share > 0:
                kernel[r + dr, c + dc] += weight * share
    return kernel / kernel.sum()


@CORRUPTIONS.register("motion_blur")
def motion_blur(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Blur along a line at a random angle of up to 45° from the horizontal."""
    length, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    angle = (torch.rand((), generator=generator).item() - 0.5) * math.pi / 2
    return _convolved(image, _motion_kernel(_scaled(image, length), max(_scaled(image, sigma), 0.3), angle))


@CORRUPTIONS.register("zoom_blur")
def zoom_blur(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean of the image and of enlargements of its center: a camera that moves forward."""
    most, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    height, width = image.shape[-2:]
    total, n = image.clone(), 1
    for zoom in np.arange(1 + step, most, step).tolist():
        h, w = max(1, round(height / zoom)), max(1, round(width / zoom))
        top, left = (height - h) // 2, (width - w) // 2
        part = image[None, :, top : top + h, left : left + w]
        total += F.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0]
        n += 1
    return total / n


def _plasma(height: int, width: int, decay: float, generator: torch.Generator) -> Tensor:
    """Return smooth noise (H, W) in [0, 1]: octaves of random grids, each `decay` times weaker than the coarser one."""
    field, strength, cells = torch.zeros(height, width), 1.0, 2
    while cells <= max(height, width):
        grid = torch.rand(1, 1, cells, cells, generator=generator)
        field += strength * F.interpolate(grid, (height, width), mode="bilinear", align_corners=True)[0, 0]
        strength, cells = strength / decay, 2 * cells
    field = field - field.min()
    return field / field.max().clamp(min=1e-6)


@CORRUPTIONS.register("fog")
def fog(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Smooth white noise over the image, the contrast lowered so that nothing saturates."""
    strength, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    height, width = image.shape[-2:]
    field = _plasma(height, width, decay, generator)
    highest = image.max()
    return (image + strength * field) * highest / (highest + strength)


@CORRUPTIONS.register("snow")
def snow(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Bright streaks over an image that is whitened a little."""
    mean, spread, threshold, length, weight = (
        (0.1, 0.3, 0.5, 10, 0.8),
        (0.2, 0.3, 0.5, 12, 0.7),
        (0.55, 0.3, 0.9, 12, 0.7),
        (0.55, 0.3, 0.85, 12, 0.65),
        (0.55, 0.3, 0.85, 15, 0.55),
    )[severity - 1]
    flakes = mean + spread * torch.randn(1, *image.shape[-2:], generator=generator)
    flakes = torch.where(flakes < threshold, 0.0, flakes.clamp(0, 1))
    angle = math.pi / 4 + torch.rand((), generator=generator).item() * math.pi / 2
    streaks = _convolved(flakes, _motion_kernel(_scaled(image, length), max(_scaled(image, 4), 0.3), angle))
    grey = image.mean(dim=0, keepdim=True)
    white = torch.maximum(image, grey * 1.5 + 0.5)
    return weight * image + (1 - weight) * white + streaks + torch.rot90(streaks, 2, (1, 2))


@CORRUPTIONS.register("brightness")
def brightness(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The value (of hue, saturation and value) rises by 0.1 ... 0.5; hue and saturation stay."""
    c = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value = image.max(dim=0, keepdim=True).values
    raised = (value + c).clamp(max=1)
    return torch.where(value > 0, image * raised / value.clamp(min=1e-6), raised)


@CORRUPTIONS.register("contrast")
def contrast(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The distance from the mean of each channel shrinks to 0.4 ... 0.05."""
    c = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = image.mean(dim=(1, 2), keepdim=True)
    return (image - mean) * c + mean


@CORRUPTIONS.register("pixelate")
def pixelate(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Shrunk to 0.6 ... 0.25 of its size and enlarged again without smoothing."""
    c = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width = image.shape[-2:]
    small = F.interpolate(image[None], (max(1, int(height * c)), max(1, int(width * c))), mode="area")
    return F.interpolate(small, (height, width), mode="nearest")[0]


@CORRUPTIONS.register("elastic")
def elastic(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Pixels move along a smooth random field: stretched at low severities, crumpled at high ones."""
    amount, smoothness = ((488, 171), (288, 20), (17, 2.2), (17, 2.9), (17, 4.1))[severity - 1]
    height, width = image.shape[-2:]
    sigma = max(_scaled(image, min(smoothness, REFERENCE_SIZE / 6)), 0.5)
    shift = torch.rand(2, height, width, generator=generator) * 2 - 1
    shift = _convolved(shift, _gaussian_kernel(sigma))
    shift = shift / shift.abs().max().clamp(min=1e-6) * min(_scaled(image, amount), _scaled(image, 10))
    base = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
    moved = base + shift
    grid = torch.stack([2 * moved[1] / max(width - 1, 1) - 1, 2 * moved[0] / max(height - 1, 1) - 1], dim=-1)
    return F.grid_sample(image[None], grid[None], padding_mode="reflection", align_corners=True)[0]


@CORRUPTIONS.register("jpeg")
def jpeg(image: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Compressed as JPEG with quality 25 ... 7."""
    quality = (25, 18, 15, 10, 7)[severity - 1]
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(stream, "JPEG", quality=quality)
    read = torch.from_numpy(np.array(Image.open(stream)))
    return (read if read.dim() == 3 else read[..., None]).permute(2, 0, 1).to(torch.float32) / 255
