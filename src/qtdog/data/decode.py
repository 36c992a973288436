"""From an image file to a uint8 array: the one definition that training, evaluation and prediction share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from qtdog.core.errors import DataError

DECODE_VERSION = 2
"""Part of the cache's key: raise it when the pixels that `decode` or `to_square` give change."""

MODES = {1: "L", 3: "RGB"}
LARGE_PIXELS = 16_000_000
"""A JPEG file with more pixels is made smaller while it is decoded, if less will do."""
SPARE = 2
"""It is left at least so many times as large as asked for: the antialiased resize that follows does the rest."""
HINT = (
    "Replace or remove it; `qtdog data verify` lists all such files, and training with --skip-unreadable goes on "
    "(a study with data.skip_unreadable: true)."
)


def decode(path: Path, channels: int = 3, size: int | None = None) -> npt.NDArray[np.uint8]:
    """Return an image file as uint8 (H, W, channels): upright, RGB or grey.

    EXIF orientation is applied, 16-bit grey is scaled to 8 bits, transparency is dropped.

    Args:
        path: the file.
        channels: 3 (RGB) or 1 (grey).
        size: what the image will be resized to, if that is known: a very large JPEG file is then decoded at a half, a
            quarter or an eighth of its size, in as much less memory.

    Raises:
        DataError: the file is missing, truncated, too large to be safe (Pillow's limit, 179 million pixels), has
            floating-point pixels, or is not an image.
    """
    try:
        with Image.open(path) as image:
            if size is not None and image.width * image.height > LARGE_PIXELS:
                image.draft(None, (SPARE * size, SPARE * size))
            return to_pixels(image, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = str(error).rstrip(".")
        raise DataError(f"{path} is too large to be safe: {reason}. Make it smaller, or remove it.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist (any more)") from error
    except Exception as error:  # Pillow's readers raise a dozen kinds of error for broken files
        raise DataError(f"{path} cannot be read as an image ({_reason(error)}). {HINT}") from error


def to_pixels(image: Image.Image, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Return a Pillow image as uint8 (H, W, channels), as `decode` does a file.

    Raises:
        ValueError: the pixels are floating-point numbers; and what Pillow raises for a broken file.

    Example:
        >>> to_pixels(Image.fromarray(np.full((1, 1), 0x1234, dtype=np.uint16)), channels=1).item() == 0x12
        True
    """
    pixels = np.asarray(_to_eight_bit(ImageOps.exif_transpose(image)).convert(MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return "not an image, or a format that is not supported" if "cannot identify" in text else text


def _to_eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
        values = np.asarray(image).astype(np.int64)
        shift = 8 if values.max(initial=0) > 255 else 0
        return Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8))
    if image.mode == "F":  # nothing says which value is white; Pillow would clip
        raise ValueError("its pixels are floating-point numbers; store them with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


def to_square(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return uint8 (H, W, C) resized to (size, size, C): antialiased bilinear, nothing cropped.

    The same pixels as torchvision's `Resize((size, size))` of a PIL image (DomainBed's evaluation transform).

    Example:
        >>> to_square(np.zeros((3, 5, 1), dtype=np.uint8), 2).shape
        (2, 2, 1)
    """
    height, width, channels = pixels.shape
    if (height, width) == (size, size):
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    resized = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return resized.reshape(size, size, channels)


def decode_resized(path: Path, size: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Return an image file as uint8 (size, size, channels): `decode`, then `to_square` (DataError as `decode`)."""
    return to_square(decode(path, channels, size), size)
