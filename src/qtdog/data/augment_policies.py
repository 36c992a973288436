"""TrivialAugment, RandAugment and AugMix on whole uint8 batches, each image with draws of its own, on any device.

Spaces and magnitudes are those of torchvision (`TrivialAugmentWide`, `RandAugment`, `AugMix` of `transforms.v2`), and
so are the operations, value by value (a test compares them). In place of torchvision's loop over images, the images
that drew the same operation are changed together. Before the policy come DomainBed's crop and flip, with the very
draws that `domainbed` has; its jitter and grey are left out.

Sources: Müller and Hutter, *TrivialAugment*, ICCV 2021; Cubuk et al., *RandAugment*, CVPR Workshops 2020; Hendrycks et
al., *AugMix*, ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtdog.core.registry import HyperParameter, HyperParameters, Value, fill
from qtdog.data.augment import AUGMENTATIONS, BLUE, CPU, GREEN, RED, AugmentParameters, draw_parameters, upload
from qtdog.data.augment_on_device import crop_flip

N_BINS = 31
AUGMIX_BINS = 10
AUGMIX_DEPTH = 3
"""Longest chain of operations, drawn from 1 to it, as published."""


def crop_and_flip(images: Tensor | Sequence[Tensor], parameters: AugmentParameters, size: int) -> Tensor:
    """Return DomainBed's crops, resized (bilinear, antialiased) and flipped, uint8 (n, C, size, size).

    Args:
        images: uint8 (n, H, W, C) on any device, or n images (H, W, C) of sizes of their own on the CPU.
        parameters: one row per image, on the CPU; only `crop` and `flip` count.
        size: height = width of the result, in pixels.
    """
    if isinstance(images, Tensor) and images.device.type != "cpu":
        return crop_flip(images, parameters, size).permute(0, 3, 1, 2).to(torch.uint8)
    result = []
    for row, (top, left, height, width) in enumerate(parameters.crop.tolist()):
        crop = images[row][None, top : top + height, left : left + width].permute(0, 3, 1, 2)
        resized = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)
        result.append(resized.flip(3) if parameters.flip[row] else resized)
    return torch.cat(result)


def grey_of(images: Tensor) -> Tensor:
    """Return the luma of uint8 images (n, C, H, W), uint8 (n, 1, H, W), truncated as torchvision truncates it."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (RED * red + GREEN * green + BLUE * blue).to(torch.uint8)[:, None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """F · images + (1 - f) · other, cut to 0 … 255 and truncated; `factor` (n,)."""
    factor = upload(factor, images.device)[:, None, None, None]
    return (factor * images + (1 - factor) * other).clamp(0, 255).to(torch.uint8)


def adjust_brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Multiply by 1 + magnitude."""
    return _blend(images, torch.zeros_like(images), 1 + magnitude)


def color(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the grey image, which has the share -magnitude; nothing happens to grey images."""
    return images if images.shape[1] == 1 else _blend(images, grey_of(images), 1 + magnitude)


def adjust_contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the mean luma, which has the share -magnitude."""
    mean = grey_of(images).float().mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean, 1 + magnitude)


def sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the image smoothed by a 3 x 3 kernel (5 in the middle, sum 13); the border stays."""
    if min(images.shape[-2:]) <= 2:
        return images
    channels = images.shape[1]
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    weight = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    smooth = images.float()
    smooth[..., 1:-1, 1:-1] = F.conv2d(smooth, weight, groups=channels).round()
    return _blend(images, smooth, 1 + magnitude)


def posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the first `magnitude` bits of each value."""
    mask = 256 - 2 ** (8 - magnitude.to(torch.int64))
    return images & upload(mask.to(torch.uint8), images.device)[:, None, None, None]


def solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Invert the values from `magnitude` on."""
    threshold = upload(magnitude, images.device)[:, None, None, None]
    return torch.where(images >= threshold, 255 - images, images)


def autocontrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Stretch each channel to 0 … 255; a constant one stays."""
    low, high = (images.amin(dim=(2, 3), keepdim=True).float(), images.amax(dim=(2, 3), keepdim=True).float())
    scale, flat = 255 / (high - low), high == low
    low, scale = torch.where(flat, 0.0, low), torch.where(flat, 1.0, scale)
    return ((images - low) * scale).clamp(0, 255).to(torch.uint8)


def equalize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Spread the values of each channel evenly, as PIL does: lut = (cumulated counts + step / 2) / step."""
    flat = images.flatten(2).flatten(0, 1).long()  # (n · C, pixels)
    counts = torch.zeros(len(flat), 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    last = 255 - counts.flip(1).ne(0).int().argmax(dim=1, keepdim=True)
    step = (counts.sum(1, keepdim=True) - counts.gather(1, last)) // 255
    before = F.pad(counts.cumsum(1), (1, 0))[:, :256]
    lut = (before + step // 2).div(step.clamp(min=1), rounding_mode="floor").clamp(0, 255)
    found = torch.where(step == 0, flat, lut.gather(1, flat))
    return found.to(torch.uint8).view(images.shape)


def _moved(images: Tensor, matrix: Tensor) -> Tensor:
    """Return images at x' = A x + b, nearest pixel, black outside; `matrix` (n, 2, 3), lengths from the center."""
    n, _, height, width = images.shape
    x = torch.linspace(-width / 2 + 0.5, width / 2 - 0.5, width, device=images.device)
    y = torch.linspace(-height / 2 + 0.5, height / 2 - 0.5, height, device=images.device)
    base = torch.ones(height, width, 3, device=images.device)
    base[..., 0], base[..., 1] = x, y[:, None]
    theta = matrix.float().transpose(1, 2) / torch.tensor([width / 2, height / 2])
    theta = upload(theta, images.device)
    grid = (base.view(1, -1, 3) @ theta).view(n, height, width, 2)
    moved = F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.round().to(torch.uint8)


def _identity(magnitude: Tensor) -> Tensor:
    return torch.eye(2, 3, dtype=torch.float64).repeat(len(magnitude), 1, 1)


def shear_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shift rows by `magnitude` times their distance from the upper edge."""
    matrix, height = _identity(magnitude), images.shape[2]
    matrix[:, 0, 1] = magnitude.double()
    matrix[:, 0, 2] = magnitude.double() * height / 2
    return _moved(images, matrix)


def shear_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Shift columns by `magnitude` times their distance from the left edge."""
    matrix, width = _identity(magnitude), images.shape[3]
    matrix[:, 1, 0] = magnitude.double()
    matrix[:, 1, 2] = magnitude.double() * width / 2
    return _moved(images, matrix)


def translate_x(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move by whole pixels to the right (left, for negative ones)."""
    matrix = _identity(magnitude)
    matrix[:, 0, 2] = -magnitude.double().trunc()
    return _moved(images, matrix)


def translate_y(images: Tensor, magnitude: Tensor) -> Tensor:
    """Move by whole pixels down (up, for negative ones)."""
    matrix = _identity(magnitude)
    matrix[:, 1, 2] = -magnitude.double().trunc()
    return _moved(images, matrix)


def rotate(images: Tensor, magnitude: Tensor) -> Tensor:
    """Turn around the center, counterclockwise, by `magnitude` degrees."""
    angle, matrix = -magnitude.double() * math.pi / 180, _identity(magnitude)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 0, 1], matrix[:, 1, 0] = angle.sin(), -angle.sin()
    return _moved(images, matrix)


def same(images: Tensor, magnitude: Tensor) -> Tensor:
    """Change nothing."""
    return images


Operation = Callable[[Tensor, Tensor], Tensor]
"""Images uint8 (n, C, H, W) on any device, magnitudes (n,) on the CPU → images of the same shape and type."""

OPERATIONS: dict[str, Operation] = {
    "identity": same,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "brightness": adjust_brightness,
    "color": color,
    "contrast": adjust_contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
}
NAMES = tuple(OPERATIONS)


@dataclass(frozen=True)
class Space:
    """The operations of a policy, with the magnitude of each bin.

    Attributes:
        operations: name → magnitudes (n_bins,) and whether their sign is drawn.
    """

    operations: dict[str, tuple[Tensor, bool]]

    def chosen(self, which: Tensor, bins: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Return operation (its number in `NAMES`) and magnitude.

        Args:
            which: int64, number of the operation in this space.
            bins: int64, of its magnitude.
            signs: bool, whether the sign is turned where it is drawn.
        """
        names = list(self.operations)
        table = torch.stack([magnitudes for magnitudes, _ in self.operations.values()])
        signed = torch.tensor([has_sign for _, has_sign in self.operations.values()])
        magnitude = table[which, bins]
        numbers = torch.tensor([NAMES.index(name) for name in names])[which]
        return numbers, torch.where(signed[which] & signs, -magnitude, magnitude)


def trivial_space() -> Space:
    """Return the wide space of TrivialAugment: 31 bins each."""
    none, one = torch.zeros(N_BINS), torch.linspace(0, 0.99, N_BINS)
    shift = torch.linspace(0, 32, N_BINS)
    bits = 8 - (torch.arange(N_BINS) / ((N_BINS - 1) / 6)).round()
    return _space(one, (shift, shift), torch.linspace(0, 135, N_BINS), one, bits, torch.linspace(255, 0, N_BINS), none)


def rand_space(height: int, width: int) -> Space:
    """Return the space of RandAugment for images of a size, 31 bins each."""
    none = torch.zeros(N_BINS)
    shear, factor = torch.linspace(0, 0.3, N_BINS), torch.linspace(0, 0.9, N_BINS)
    shifts = (torch.linspace(0, 150 / 331 * width, N_BINS), torch.linspace(0, 150 / 331 * height, N_BINS))
    bits = 8 - (torch.arange(N_BINS) / ((N_BINS - 1) / 4)).round()
    return _space(shear, shifts, torch.linspace(0, 30, N_BINS), factor, bits, torch.linspace(255, 0, N_BINS), none)


def augmix_space(height: int, width: int) -> Space:
    """Return the space of AugMix for images of a size, 10 bins each, without the operations of ImageNet-C."""
    none = torch.zeros(AUGMIX_BINS)
    shear, factor = torch.linspace(0, 0.3, AUGMIX_BINS), torch.linspace(0, 0.9, AUGMIX_BINS)
    shifts = (torch.linspace(0, width / 3, AUGMIX_BINS), torch.linspace(0, height / 3, AUGMIX_BINS))
    bits = 4 - (torch.arange(AUGMIX_BINS) / ((AUGMIX_BINS - 1) / 4)).round()
    angles, thresholds = torch.linspace(0, 30, AUGMIX_BINS), torch.linspace(255, 0, AUGMIX_BINS)
    whole = _space(shear, shifts, angles, factor, bits, thresholds, none).operations
    left_out = ("identity", "brightness", "color", "contrast", "sharpness")
    return Space({name: how for name, how in whole.items() if name not in left_out})


def _space(
    shear: Tensor,
    shifts: tuple[Tensor, Tensor],
    angles: Tensor,
    factors: Tensor,
    bits: Tensor,
    thresholds: Tensor,
    none: Tensor,
) -> Space:
    blends = ("brightness", "color", "contrast", "sharpness")
    return Space(
        {"identity": (none, False), "shear_x": (shear, True), "shear_y": (shear, True)}
        | {"translate_x": (shifts[0], True), "translate_y": (shifts[1], True), "rotate": (angles, True)}
        | dict.fromkeys(blends, (factors, True))
        | {"posterize": (bits, False), "solarize": (thresholds, False)}
        | {"autocontrast": (none, False), "equalize": (none, False)}
    )


def apply_operations(images: Tensor, which: Tensor, magnitude: Tensor) -> Tensor:
    """Return images each changed by an operation of its own; those that drew the same one are changed together.

    Args:
        images: uint8 (n, C, H, W), on any device; not changed.
        which: int64 (n,), numbers in `NAMES`; on the CPU.
        magnitude: float32 (n,), on the CPU.

    Example:
        >>> images = torch.full((2, 3, 4, 4), 200, dtype=torch.uint8)
        >>> which = torch.tensor([NAMES.index("identity"), NAMES.index("solarize")])
        >>> apply_operations(images, which, torch.tensor([0.0, 128.0]))[:, 0, 0, 0].tolist()
        [200, 55]
    """
    result = images.clone()
    for number in which.unique().tolist():
        if NAMES[number] != "identity":
            rows = torch.nonzero(which == number)[:, 0]
            there = upload(rows, images.device)
            result[there] = OPERATIONS[NAMES[number]](images[there], magnitude[rows])
    return result


Draws = dict[str, Tensor]
"""What a policy drew, each of n rows."""


@dataclass(frozen=True)
class Policy:
    """An augmentation: what it draws, and what it does with it.

    Attributes:
        about: one line.
        hyperparameters: name → default, range, meaning.
        draw: generator, n, (height, width), hyper-parameters → draws, whose number depends on n alone.
        apply: images uint8 (n, C, H, W) and their rows of the draws → images.
    """

    about: str
    hyperparameters: HyperParameters
    draw: Callable[[torch.Generator, int, tuple[int, int], Mapping[str, Any]], Draws]
    apply: Callable[[Tensor, Draws], Tensor]


def _draw_trivial(generator: torch.Generator, n: int, size: tuple[int, int], params: Mapping[str, Any]) -> Draws:
    space = trivial_space()
    which = torch.randint(len(space.operations), (n,), generator=generator)
    bins = torch.randint(N_BINS, (n,), generator=generator)
    signs = torch.rand(n, generator=generator) < 0.5
    numbers, magnitude = space.chosen(which, bins, signs)
    return {"which": numbers[:, None], "magnitude": magnitude[:, None]}


def _draw_rand(generator: torch.Generator, n: int, size: tuple[int, int], params: Mapping[str, Any]) -> Draws:
    space, n_ops = rand_space(*size), int(params["n_ops"])
    which = torch.randint(len(space.operations), (n, n_ops), generator=generator)
    signs = torch.rand((n, n_ops), generator=generator) < 0.5
    numbers, magnitude = space.chosen(which, torch.full_like(which, int(params["magnitude"])), signs)
    return {"which": numbers, "magnitude": magnitude}


def _apply_in_turn(images: Tensor, draws: Draws) -> Tensor:
    for turn in range(draws["which"].shape[1]):
        images = apply_operations(images, draws["which"][:, turn], draws["magnitude"][:, turn])
    return images


def _gamma(alpha: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return draws of a Gamma distribution; torch.distributions takes no generator."""
    draw: Any = getattr(torch, "_standard_gamma")  # noqa: B009  (not among torch's typed names)
    return draw(torch.full(shape, alpha), generator=generator)


def _draw_augmix(generator: torch.Generator, n: int, size: tuple[int, int], params: Mapping[str, Any]) -> Draws:
    space, width, alpha = augmix_space(*size), int(params["width"]), float(params["alpha"])
    shape = (n, width, AUGMIX_DEPTH)
    which = torch.randint(len(space.operations), shape, generator=generator)
    bins = torch.randint(int(params["severity"]), shape, generator=generator)
    signs = torch.rand(shape, generator=generator) < 0.5
    numbers, magnitude = space.chosen(which, bins, signs)
    depth = torch.randint(1, AUGMIX_DEPTH + 1, (n, width, 1), generator=generator)
    if int(params["depth"]) > 0:
        depth = torch.full_like(depth, int(params["depth"]))
    numbers = torch.where(torch.arange(AUGMIX_DEPTH) < depth, numbers, NAMES.index("identity"))
    gammas, share = _gamma(alpha, (n, width), generator), _gamma(alpha, (n, 2), generator)
    return {
        "which": numbers,
        "magnitude": magnitude,
        "weights": gammas / gammas.sum(1, keepdim=True),
        "clean": share[:, 0] / share.sum(1),
    }


def _apply_augmix(images: Tensor, draws: Draws) -> Tensor:
    device = images.device
    clean = upload(draws["clean"], device)[:, None, None, None]
    weights = upload(draws["weights"] * (1 - draws["clean"])[:, None], device)[:, :, None, None, None]
    mixed = clean * images
    for chain in range(draws["which"].shape[1]):
        parts = {name: draws[name][:, chain] for name in ("which", "magnitude")}
        mixed += weights[:, chain] * _apply_in_turn(images, parts)
    return mixed.clamp(0, 255).to(torch.uint8)


POLICIES: dict[str, Policy] = {
    "trivialaugment": Policy(
        "one random operation of random strength per image (Müller and Hutter, ICCV 2021)",
        {},
        _draw_trivial,
        _apply_in_turn,
    ),
    "randaugment": Policy(
        "some random operations of one strength per image (Cubuk et al., CVPR Workshops 2020)",
        {
            "n_ops": HyperParameter(2, "operations per image", low=1, high=8),
            "magnitude": HyperParameter(9, "bin of their strength, of 31", low=0, high=N_BINS - 1),
        },
        _draw_rand,
        _apply_in_turn,
    ),
    "augmix": Policy(
        "a mixture of the image and of chains of operations (Hendrycks et al., ICLR 2020)",
        {
            "severity": HyperParameter(3, "bins of strength that are drawn from, of 10", low=1, high=AUGMIX_BINS),
            "width": HyperParameter(3, "chains", low=1, high=8),
            "depth": HyperParameter(-1, "operations per chain; -1 draws 1 to 3", low=-1, high=AUGMIX_DEPTH),
            "alpha": HyperParameter(1.0, "of the Dirichlet and Beta distributions of the mixture", low=0.01),
        },
        _draw_augmix,
        _apply_augmix,
    ),
}


@dataclass(frozen=True)
class Augmented:
    """What an augmentation by policy gives.

    Attributes:
        clean: cropped and flipped alone, uint8 (n, C, size, size).
        views: after the policy, one tensor like it per view that was asked for.
    """

    clean: Tensor
    views: tuple[Tensor, ...]


@dataclass(frozen=True)
class PolicyAugmentation:
    """A policy with its hyper-parameters, ready for batches.

    Args:
        name: of `POLICIES`.
        params: its hyper-parameters; those left out have their defaults.

    Raises:
        KeyError: no such policy.
        ConfigError: an unknown hyper-parameter or value.

    Example:
        >>> augmentation = PolicyAugmentation("randaugment", {"n_ops": 1})
        >>> images = torch.zeros((4, 16, 16, 3), dtype=torch.uint8)
        >>> made = augmentation(images, torch.arange(4), torch.Generator().manual_seed(0), n=4, size=16)
        >>> made.views[0].shape
        torch.Size([4, 3, 16, 16])
    """

    name: str
    params: Mapping[str, Value]

    def __post_init__(self) -> None:
        """Fill in and check the hyper-parameters."""
        known = POLICIES[self.name].hyperparameters
        object.__setattr__(self, "params", fill(f"augmentation '{self.name}'", known, self.params))

    def __call__(
        self,
        images: Tensor | Sequence[Tensor],
        rows: Tensor,
        generator: torch.Generator,
        *,
        n: int,
        size: int,
        sizes: Tensor | None = None,
        n_views: int = 1,
        device: torch.device = CPU,
    ) -> Augmented:
        """Return the images cropped, flipped and changed by the policy.

        Args:
            images: uint8 (b, H, W, C), or b images (H, W, C) of sizes of their own; on any device.
            rows: int64 (b,), which of the n draws are theirs.
            generator: of all draws, on the CPU; it draws for n images whatever b is.
            n: images of the whole batch, over all processes.
            size: height = width of the result, in pixels.
            sizes: int64 (n, 2), height and width of each image of the whole batch, where they differ.
            n_views: how often the policy is drawn for the same crops.
            device: where the policy works and the result lies, if the images are on the CPU.
        """
        policy = POLICIES[self.name]
        parameters = draw_parameters(generator, n, size if sizes is None else sizes).take(rows)
        clean = upload(crop_and_flip(images, parameters, size), device)
        views = []
        for _ in range(n_views):
            draws = policy.draw(generator, n, (size, size), self.params)
            views.append(policy.apply(clean, {name: values[rows] for name, values in draws.items()}))
        return Augmented(clean, tuple(views))


def _member(name: str) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return a policy, with its defaults, as a member of the axis: its name is taken, and others may call it."""

    def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
        n, size = images.shape[:2]
        made = PolicyAugmentation(name, {})(images, torch.arange(n), generator, n=n, size=size)
        return made.views[0].permute(0, 2, 3, 1)

    defaults = {key: how.default for key, how in POLICIES[name].hyperparameters.items()}
    values = ", ".join(f"{key}={value:g}" for key, value in defaults.items() if isinstance(value, (int, float)))
    augmented.__doc__ = (
        POLICIES[name].about[0].upper() + POLICIES[name].about[1:] + "." + (f" [params: {values}]" if values else "")
    )
    return augmented


for _name in POLICIES:
    AUGMENTATIONS.add(_name, _member(_name))
