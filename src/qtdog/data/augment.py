"""Memory that is used again: fresh memory costs a page fault per 4 KiB, up to a third of the augmentation's time."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from qtdog.core.registry import Registry

# Augmentations of plug-ins: images uint8 (n, H, W, C) and a generator → the same shape and type.
AUGMENTATIONS: Registry[Callable[[Tensor, torch.Generator], Tensor]] = Registry("augmentation")


class BufferPool:
    """Hands out tensors whose memory comes back once nothing refers to them any more; safe to use from several threads.

    Args:
        n_kept: how many buffers of one size are kept for later.

    Example:
        >>> pool = BufferPool()
        >>> first = pool.take((2, 3), torch.float32)
        >>> address = first.data_ptr()
        >>> del first
        >>> pool.take((3, 2), torch.float32).data_ptr() == address
        True
    """

    def __init__(self, n_kept: int = 8) -> None:
        self.n_kept = n_kept
        self._free: dict[int, list[Tensor]] = {}
        self._lock = threading.RLock()  # re-entered when a collection of garbage inside `take` gives a buffer back

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor with undefined content."""
        n_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            free = self._free.setdefault(n_bytes, [])
            memory = free.pop() if free else torch.empty(n_bytes, dtype=torch.uint8)
        lease = memory.numpy()  # a new view, which the returned tensor's storage keeps alive, and so all views of it
        weakref.finalize(lease, self._give_back, memory).atexit = False
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _give_back(self, memory: Tensor) -> None:
        with self._lock:
            free = self._free[memory.nbytes]
            if len(free) < self.n_kept:
                free.append(memory)


WHITE = 255.0
"""The largest value. All operations are homogeneous, so the division by 255 can wait until the normalization."""

RED, GREEN, BLUE = 0.2989, 0.587, 0.114
CENTERS = (0.0, 2.0, -2.0)
"""Where red, green and blue lie on the hue circle, whose circumference is 6."""

TINY = 1e-30
N_SPARE = 4


def grey(planes: Tensor, out: Tensor) -> Tensor:
    """Return the luma 0.2989 R + 0.587 G + 0.114 B (ITU-R 601-2) of three planes, (n, H, W), written to `out`."""
    return torch.mul(planes[0], RED, out=out).add_(planes[1], alpha=GREEN).add_(planes[2], alpha=BLUE)


def brightness_(planes: Tensor, factor: Tensor, spare: Tensor) -> None:
    """Multiply by `factor` (n, 1, 1)."""
    del spare
    planes.mul_(factor).clamp_(max=WHITE)


def contrast_(planes: Tensor, factor: Tensor, spare: Tensor) -> None:
    """Blend with the image's mean luma: f · x + (1 - f) · mean(grey(x)), `factor` f (n, 1, 1).

    The mean of the luma is the luma of the planes' means. These are taken in two stages: torch splits a long sum with
    a single result among its threads, and the last bit would depend on their number.
    """
    del spare
    means = planes.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
    mean = means[0] if means.shape[0] == 1 else grey(means, torch.empty_like(means[0]))
    planes.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, WHITE)


def saturation_(planes: Tensor, factor: Tensor, spare: Tensor) -> None:
    """Blend with the pixel's luma: f · x + (1 - f) · grey(x), `factor` f (n, 1, 1); nothing to do for one plane."""
    if planes.shape[0] == 3:
        torch.lerp(grey(planes, spare[0]), planes, factor, out=planes).clamp_(0, WHITE)


def hue_shifts(turn: Tensor) -> Tensor:
    """Return what `hue_` adds to the hue for each color, (3, n, 1, 1), for turns (n, 1, 1), shares of a circle.

    It is 6 · turn - c, taken round the circle into [-3, 3), so that |x| <= 6 for its sum x with a hue in (-3, 3].
    """
    return torch.remainder(6 * turn - torch.tensor(CENTERS)[:, None, None, None] + 3, 6) - 3


def hue_(planes: Tensor, shifts: Tensor, spare: Tensor) -> None:
    """Turn the hue, as going to HSV and back would; `shifts` as `hue_shifts` gives them; not for one plane.

    With V = max, m = min, chroma C = V - m, and the hue circle of circumference 6 laid out as (-3, 3] around red:
    |H| = (G + B - R + V - 2m) / C, with the sign of G - B. A color whose center lies at c on the circle then becomes
    m + C · clamp(2 - d, 0, 1), where d is the distance on the circle from H + 6 · turn to c. With x = H + 6 · turn - c
    and |x| <= 6 that distance is 3 - ||x| - 3|: no branches and no sextants.
    """
    if planes.shape[0] != 3:
        return
    red, green, blue = planes.unbind()
    chroma, base, hue, scratch = spare.unbind()
    torch.maximum(torch.maximum(red, green, out=chroma), blue, out=chroma)
    torch.minimum(torch.minimum(red, green, out=base), blue, out=base)
    torch.add(green, blue, out=hue).sub_(red).add_(chroma).sub_(base, alpha=2)
    chroma.sub_(base)
    hue.div_(torch.add(chroma, TINY, out=scratch)).copysign_(torch.sub(green, blue, out=scratch))
    base.sub_(chroma)
    for plane, shift in zip((red, green, blue), shifts.unbind(), strict=True):
        weight = torch.add(hue, shift, out=scratch).abs_().sub_(3).abs_().clamp_(1, 2)  # 1 + clamp(2 - d, 0, 1)
        torch.addcmul(base, chroma, weight, out=plane)


JITTER_FUNCTIONS = (brightness_, contrast_, saturation_, hue_)
"""The four operations, in the order of `AugmentParameters.factors`."""


SCALE = (0.7, 1.0)
RATIO = (3 / 4, 4 / 3)
JITTER_STRENGTH = 0.3
GREY_FRAC = 0.1
TRIES = 10


@dataclass(frozen=True)
class AugmentParameters:
    """One row per image.

    Attributes:
        crop: int64 (n, 4), top, left, height, width in pixels.
        flip: bool (n,).
        factors: float32 (n, 4): factors of brightness, contrast and saturation; turn of the hue (share of a circle).
        order: int64 (n, 4), the order in which the four are applied.
        grey: bool (n,), whether the image loses its colors at the end.
    """

    crop: Tensor
    flip: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.flip)

    def take(self, rows: Tensor) -> AugmentParameters:
        """Return the parameters of some images (`rows` int64)."""
        return AugmentParameters(
            self.crop[rows], self.flip[rows], self.factors[rows], self.order[rows], self.grey[rows]
        )


def draw_parameters(generator: torch.Generator, n: int, size: int | Tensor) -> AugmentParameters:
    """Return DomainBed's random augmentation for n images of `size` x `size` pixels, or of sizes of their own.

    Random resized crop (area 0.7 to 1, aspect 3/4 to 4/3), flip with probability 1/2, jitter of brightness, contrast
    and saturation by factors U(0.7, 1.3) and of the hue by U(-0.3, 0.3), in random order, and grey with probability
    0.1.

    Args:
        generator: of all draws, whose number depends on n alone.
        n: images.
        size: height = width of all, or int64 (n, 2), height and width of each.

    Example:
        >>> draw_parameters(torch.Generator().manual_seed(0), 5, 32).crop.shape
        torch.Size([5, 4])
    """
    crop = _draw_crops(generator, n, size)
    flip = torch.rand(n, generator=generator) < 0.5
    factors = 1 + JITTER_STRENGTH * (2 * torch.rand((n, 4), generator=generator) - 1)
    factors[:, 3] -= 1
    order = torch.rand((n, 4), generator=generator).argsort(dim=1)
    grey = torch.rand(n, generator=generator) < GREY_FRAC
    return AugmentParameters(crop, flip, factors, order, grey)


def _draw_crops(generator: torch.Generator, n: int, size: int | Tensor) -> Tensor:
    """The first of ten tries that fits into the image, as in torchvision; if none does, the largest central one."""
    sizes = torch.full((n, 2), size) if isinstance(size, int) else size
    rows, columns = sizes.to(torch.float64)[:, :, None].unbind(1)
    uniform = torch.rand((4, n, TRIES), generator=generator, dtype=torch.float64)
    area = rows * columns * (SCALE[0] + (SCALE[1] - SCALE[0]) * uniform[0])
    log_low, log_high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(log_low + (log_high - log_low) * uniform[1])
    width, height = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (width <= columns) & (height <= rows)
    top, left = (uniform[2] * (rows - height + 1)).floor(), (uniform[3] * (columns - width + 1)).floor()
    tries = torch.stack([top, left, height, width], dim=2)
    first = tries[torch.arange(n), fits.int().argmax(dim=1)]
    return torch.where(fits.any(dim=1, keepdim=True), first, _central(rows, columns)).to(torch.int64)


def _central(rows: Tensor, columns: Tensor) -> Tensor:
    """The largest central crop whose aspect lies in `RATIO`: top, left, height, width, float64 (n, 4)."""
    height = torch.minimum(rows, (columns / RATIO[0]).round())
    width = torch.minimum(columns, (rows * RATIO[1]).round())
    top, left = ((rows - height) / 2).floor(), ((columns - width) / 2).floor()
    return torch.cat([top, left, height, width], dim=1)


CPU = torch.device("cpu")


WAITS = ("mps", "xpu")  # copies from ordinary memory that do not wait would read what is overwritten meanwhile


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. The host waits for the copy on `WAITS` alone; CUDA reads page-locked memory."""
    if device == tensor.device:
        return tensor
    source = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return source.to(device, non_blocking=device.type not in WAITS)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x / 255 - mean) / std, float32 (n, C, H, W) in channels-last memory.

    Args:
        images: uint8 (n, H, W, C), on any device.
        mean: per channel, of images in [0, 1].
        std: likewise.

    Example:
        >>> normalize(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), [0.5], [0.5]).flatten()
        tensor([1.])
    """
    n, height, width, channels = images.shape
    # One row of W · C constants makes the innermost loop long: ten times faster than broadcasting C of them.
    scale = torch.tensor(std, dtype=torch.float32).mul_(255).reciprocal_().expand(channels).repeat(width)
    offset = (torch.tensor(mean, dtype=torch.float32) / torch.tensor(std)).expand(channels).repeat(width)
    scale, offset = upload(scale, images.device), upload(offset, images.device)
    flat = images.reshape(n * height, width * channels).to(torch.float32)
    return flat.mul_(scale).sub_(offset).reshape(n, height, width, channels).permute(0, 3, 1, 2)


CHUNK_PIXELS = 3 << 14
"""Pixels that are changed together: their seven planes stay in a core's cache, and calls cost less than their work."""


def augment(
    images: Tensor | Sequence[Tensor],
    parameters: AugmentParameters,
    *,
    size: int | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    pool: BufferPool | None = None,
) -> Tensor:
    """Return augmented images, (x - mean) / std, float32 (n, C, H, W) in channels-last memory.

    Args:
        images: uint8 (n, H, W, C) with C = 3 or 1, or n images (H, W, C) of sizes of their own; not changed.
        parameters: one row per image (`draw_parameters`).
        size: height = width of the result; default: those of the images, which then are all alike.
        mean: per channel, or one for all; with the default mean and std the result is in [0, 1].
        std: likewise.
        pool: where the memory comes from; default: fresh memory.

    Example:
        >>> from qtdog.data.augment import draw_parameters
        >>> images = torch.zeros((2, 32, 32, 3), dtype=torch.uint8)
        >>> augment(images, draw_parameters(torch.Generator(), 2, 32)).shape
        torch.Size([2, 3, 32, 32])
    """
    pool = pool or BufferPool()
    n, (height, width, channels) = len(images), images.shape[1:] if isinstance(images, Tensor) else images[0].shape
    if size is not None:
        height = width = size
    n_together = max(1, CHUNK_PIXELS // (height * width))
    workspace = pool.take(((channels + N_SPARE) * n_together * height * width,), torch.float32)
    result = pool.take((n, height, width, channels), torch.float32)
    shift = (-torch.tensor(mean).div(torch.tensor(std))).expand(channels).unbind()
    scale = (1 / (WHITE * torch.tensor(std))).expand(channels).tolist()
    rows, groups = _by_order(parameters.order, n_together)
    drawn = parameters.take(rows)
    factors = drawn.factors.T[:, :, None, None]
    changes = (*factors[:3].unbind(), hue_shifts(factors[3]))
    targets, crops, flips = rows.tolist(), drawn.crop.tolist(), drawn.flip.tolist()
    orders, greys = drawn.order.tolist(), drawn.grey.tolist()
    for group in groups:
        shape = (channels + N_SPARE, group.stop - group.start, height, width)
        planes, spare = workspace[: math.prod(shape)].view(shape).split((channels, N_SPARE))
        _crop(images, zip(targets[group], crops[group], flips[group], strict=True), planes)
        for operation in orders[group.start]:
            JITTER_FUNCTIONS[operation](planes, changes[operation][..., group, :, :], spare)
        if channels == 3:
            for place in (i for i, is_grey in enumerate(greys[group]) if is_grey):
                planes[:, place] = grey(planes[:, place], spare[0, place])
        _write_normalized(planes, result, targets[group], shift, scale)
    return result.permute(0, 3, 1, 2)


def _by_order(order: Tensor, most: int) -> tuple[Tensor, list[slice]]:
    """All rows, those with one order of the jitter behind each other, and groups of them, `most` at most in each."""
    codes, rows = (order @ torch.tensor([64, 16, 4, 1])).sort(stable=True)
    counts = torch.unique_consecutive(codes, return_counts=True)[1].tolist()
    ends = itertools.pairwise(itertools.accumulate(counts, initial=0))
    return rows, [slice(i, min(i + most, end)) for start, end in ends for i in range(start, end, most)]


def _crop(
    images: Tensor | Sequence[Tensor], draws: Iterable[tuple[int, tuple[int, int, int, int], bool]], planes: Tensor
) -> None:
    """Crop, resize back (in uint8, as the original does on PIL images) and flip; write planes in [0, WHITE]."""
    size = planes.shape[2:]
    by_image = planes.numpy()
    for place, (row, (top, left, height, width), flip) in enumerate(draws):
        crop = images[row][None, top : top + height, left : left + width].permute(0, 3, 1, 2)
        resized = interpolate(crop, size=size, mode="bilinear", antialias=True)[0].numpy()
        # NumPy converts, separates the colors and flips (a negative stride) in one pass; torch would need two.
        np.copyto(by_image[:, place], resized[:, :, ::-1] if flip else resized)


def _write_normalized(
    planes: Tensor, result: Tensor, rows: Sequence[int], shift: Sequence[Tensor], scale: Sequence[float]
) -> None:
    """Normalize in place, then write the images into their rows of `result`, channels last."""
    values, images = planes.numpy(), result.numpy()
    for c, (one_shift, one_scale) in enumerate(zip(shift, scale, strict=True)):
        torch.add(one_shift, planes[c], alpha=one_scale, out=planes[c])
        for place, row in enumerate(rows):
            images[row, :, :, c] = values[c, place]  # a strided copy, which takes NumPy half the time of torch
