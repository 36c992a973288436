"""From an image file to a uint8 array: the one definition that training, evaluation and prediction share."""

from __future__ import annotations

import importlib.util
import io
import os
import stat
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps

from qtdog.core.errors import DataError

DECODE_VERSION = 4
"""Part of the cache's key: raise it when the pixels that `decode` or `to_square` give change."""

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
"""What Pillow may open. Others run programs (EPS starts Ghostscript) or are seldom meant as images."""
MODES = {1: "L", 3: "RGB"}
LARGE_PIXELS = 16_000_000
"""A JPEG file with more pixels is made smaller while it is decoded, if less will do."""
SMALL_BYTES = 1 << 28
"""Images that take more memory to decode come one at a time."""
SPARE = 2
"""It is left at least so many times as large as asked for: the antialiased resize that follows does the rest."""
MAX_DECODE_BYTES = 1 << 31
"""Memory that decoding one image may take."""
MAX_FILE_BYTES = 1 << 30
LONGEST = 2
"""So many times as long as wide is an image at most of which `to_shorter_side` keeps everything."""
FULL_RANGE = 1 << 14
"""A 16-bit image whose largest value is smaller holds 12 or fewer bits, or is very dark: nobody can tell which."""
HINT = (
    "Replace or remove it; `qtdog data verify` lists all such files, and training with --skip-unreadable goes on "
    "(a study with data.skip_unreadable: true)."
)
_one_large_image = threading.Lock()


class DecodeError(DataError):
    """The content of a file is no image that can be decoded; another try gives the same."""


class FileGoneError(DataError):
    """There is no such file (any more)."""


def decode(path: Path, channels: int = 3, size: int | None = None) -> npt.NDArray[np.uint8]:
    """Return an image file as uint8 (H, W, channels): upright, RGB or grey.

    EXIF orientation is applied, 16-bit grey is scaled to 8 bits, transparency is dropped.

    Args:
        path: the file.
        channels: 3 (RGB) or 1 (grey).
        size: what the image will be resized to, if that is known: a very large JPEG file is then decoded at a half, a
            quarter or an eighth of its size, in as much less memory.

    Raises:
        FileGoneError: there is no such file.
        DecodeError: it is truncated, is not an image, takes too much memory to decode, or has pixels of which nothing
            says which value is white.
        DataError: it is no regular file, or the machine failed to read it.
    """
    return decode_bytes(read_file(path), str(path), channels, size)


def read_file(path: Path | str) -> bytes:
    """Return the content of a regular file; a pipe, a socket or a device is refused and not waited for.

    Raises:
        FileGoneError: there is no such file.
        DecodeError: it is too large for an image (1 GiB).
        DataError: it is no regular file, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as stream:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{path} is no regular file (a folder, a pipe, a socket or a device). Remove it.")
            if found.st_size > MAX_FILE_BYTES:
                raise DecodeError(f"{path} is too large to be safe: {found.st_size:,} bytes. {HINT}")
            return stream.readall()
    except FileNotFoundError as error:
        raise FileGoneError(f"{path} does not exist (any more)") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the disk, and start again.") from error


def decode_bytes(content: bytes, name: str, channels: int = 3, size: int | None = None) -> npt.NDArray[np.uint8]:
    """Return the content of an image file as uint8 (H, W, channels), as `decode` does; `name` is for messages.

    Raises:
        DecodeError: as in `decode`.
        DataError: the memory does not suffice.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats(content)) as image:
            stored = image.width * image.height
            if size is not None and stored > LARGE_PIXELS:
                image.draft(None, (SPARE * size, SPARE * size))
            n_bytes = decode_bytes_needed(image, stored, len(content))
            if n_bytes <= SMALL_BYTES:
                return to_pixels(image, channels)
            if n_bytes > MAX_DECODE_BYTES:
                text = f"decoding {image.width} x {image.height} pixels takes {n_bytes:,} bytes"
                raise Image.DecompressionBombError(text)
            with _one_large_image:
                return to_pixels(image, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = str(error).rstrip(".")
        raise DecodeError(f"{name} is too large to be safe: {reason}. Make it smaller, or remove it.") from error
    except MemoryError as error:
        raise DataError(f"{name} cannot be decoded: the memory does not suffice. Free some.") from error
    except Exception as error:  # Pillow's readers raise a dozen kinds of error for broken files
        raise DecodeError(f"{name} cannot be read as an image ({_reason(error, content)}). {HINT}") from error


def decoder() -> str:
    """Return what decodes images here, with versions: other versions may read what these cannot."""
    heif = "-heif" if importlib.util.find_spec("pillow_heif") else ""
    return f"{DECODE_VERSION}-pillow-{PIL.__version__}{heif}"


def to_pixels(image: Image.Image, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Return a Pillow image as uint8 (H, W, channels), as `decode` does a file.

    16-bit images keep their upper 8 bits: 65,535 is white. Nothing in a file says that another value is white, so an
    image whose values lie below 16,384 is refused: it may hold 12 bits, which would come out nearly black.

    Raises:
        ValueError: the pixels are floating-point numbers, signed, of more than 16 bits, or of fewer bits than they are
            stored with; and what Pillow raises for a broken file.

    Example:
        >>> to_pixels(Image.fromarray(np.full((1, 1), 0x8034, dtype=np.uint16)), channels=1).item() == 0x80
        True
    """
    stored = _stored_as(image)
    turned = image.getexif().get(ORIENTATION, 1) != 1
    upright = _to_eight_bit(ImageOps.exif_transpose(image) if turned else image, stored)
    pixels = np.asarray(upright if upright.mode == MODES[channels] else upright.convert(MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def _stored_as(image: Image.Image) -> str:
    """Return how Pillow calls the pixels of a file that is not loaded yet, like "RGB;16B"; "" if it is not known."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3]
        return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
    return ""


def _to_eight_bit(image: Image.Image, stored: str) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
        values = np.asarray(image)
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        if low < 0 or high > 0xFFFF:
            raise ValueError(f"its values go from {low:,} to {high:,}, and nothing says which is white; {EIGHT_BITS}")
        if 0 < high < FULL_RANGE:
            raise ValueError(
                f"it has 16 bits, but no value above {high:,}, and nothing says which is white; {EIGHT_BITS}"
            )
        if image.mode == "I" and image.format == "TIFF":
            raise ValueError(f"its values are signed or have 32 bits, and nothing says which is white; {EIGHT_BITS}")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError(f"its pixels are floating-point numbers, and nothing says which is white; {EIGHT_BITS}")
    if ";16" in stored and image.mode in ("RGB", "RGBA", "RGBX", "LA"):  # Pillow has kept the upper 8 bits
        _require_full_range(image)
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image


def _require_full_range(image: Image.Image) -> None:
    """Refuse an image of the upper 8 of 16 bits that are all small (ValueError)."""
    colors = image.getextrema()[: 1 if image.mode == "LA" else 3]
    high = max(int(high) for _, high in colors)  # pyright: ignore[reportGeneralTypeIssues]  # several bands
    if 0 < high < FULL_RANGE >> 8:
        largest = (high << 8) + 255
        raise ValueError(
            f"it has 16 bits, but no value above {largest:,}, and nothing says which is white; {EIGHT_BITS}"
        )


EIGHT_BITS = "store all images of the data set with 8 bits, scaled alike"


BYTES_PER_PIXEL = {"WEBP": 24, "JPEG2000": 26, "AVIF": 24, "TIFF": 20}
"""What the decoders of these formats take, with everything that is made of the pixels.

`python tests/stress/decode_memory.py` measures it.
"""
RGB_BYTES_PER_PIXEL, OTHER_BYTES_PER_PIXEL = 11, 16
"""Of other formats: what is not RGB is converted, so that a second copy is in memory."""
COEFFICIENT_BYTES = 8
"""Of each pixel of a progressive JPEG file, whatever it is made smaller to: a 16-bit number for each channel."""


def decode_bytes_needed(image: Image.Image, n_stored: int, n_file: int) -> int:
    """Return an upper bound of the memory that decoding an opened image takes, in bytes.

    Args:
        image: opened and not loaded; perhaps made smaller by `draft`.
        n_stored: pixels in the file.
        n_file: bytes of the file, which is in memory.
    """
    usual = RGB_BYTES_PER_PIXEL if image.mode == "RGB" else OTHER_BYTES_PER_PIXEL
    per_pixel = BYTES_PER_PIXEL.get(image.format or "", usual)
    # the turned copy; a PNG file may say only behind its pixels that it lies on its side
    if image.format == "PNG" or image.getexif().get(ORIENTATION, 1) != 1:
        per_pixel += 4
    coefficients = COEFFICIENT_BYTES * n_stored if image.info.get("progressive") else 0
    return image.width * image.height * per_pixel + coefficients + n_file


ORIENTATION = 0x0112  # of EXIF


def _formats(content: bytes) -> tuple[str, ...]:
    if _is_heic(content) and importlib.util.find_spec("pillow_heif"):
        import pillow_heif  # pyright: ignore[reportMissingImports]  # optional, not one of our extras

        pillow_heif.register_heif_opener()
        return (*FORMATS, "HEIF")
    return FORMATS


def _is_heic(content: bytes) -> bool:
    return content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        if _is_heic(content):
            return "a HEIC image, which 'pip install pillow-heif' makes readable; or store it as JPEG"
        return "not an image, or a format that is not supported"
    return str(error) or type(error).__name__


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


def to_shorter_side(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Return uint8 (H, W, C) with its aspect kept and a shorter side of at most `side`: Lanczos, never enlarged.

    Lanczos keeps the fine detail that a second resize needs. Of an image more than twice as long as wide only the
    central 2 : 1 remains: no crop of `data.augment.draw_parameters` takes anything else of it.

    Example:
        >>> to_shorter_side(np.zeros((30, 90, 1), dtype=np.uint8), 10).shape
        (10, 20, 1)
    """
    height, width, channels = pixels.shape
    tall, wide = min(height, LONGEST * width), min(width, LONGEST * height)
    top, left = (height - tall) // 2, (width - wide) // 2
    pixels = pixels[top : top + tall, left : left + wide]
    if min(tall, wide) <= side:
        return pixels
    scale = side / min(tall, wide)
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels))
    target = (max(side, round(wide * scale)), max(side, round(tall * scale)))
    resized = np.asarray(image.resize(target, Image.Resampling.LANCZOS))
    return resized.reshape(*resized.shape[:2], channels)


def decode_resized(path: Path, size: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Return an image file as uint8 (size, size, channels): `decode`, then `to_square`; errors as in `decode`."""
    return to_square(decode(path, channels, size), size)
