"""Peak memory of decoding an image of 25 million pixels of each kind, against the bound that decides what is refused.

    python tests/stress/decode_memory.py

Each image is decoded in a process of its own. The exit code is 1 if one took more than `decode_bytes_needed` says.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qtdog.data import decode as module

SIDE = 5000
BYTES_OF_PROCESS = 8e6  # what else a process may take meanwhile


def plain(mode: str, **how: Any) -> Callable[[Path], None]:
    """Return what saves an image of one color."""
    color = {"RGB": (200, 10, 30), "RGBA": (200, 10, 30, 40), "LA": (200, 10), "CMYK": (9, 9, 9, 9)}.get(mode, 1)
    return lambda path: Image.new(mode, (SIDE, SIDE), color).save(path, **how)


def sixteen_bits(**how: Any) -> Callable[[Path], None]:
    """Return what saves a 16-bit grey image."""
    return lambda path: Image.fromarray(np.full((SIDE, SIDE), 40_000, dtype=np.uint16)).save(path, **how)


def png_16(path: Path, channels: int, value: int = 0xC000, side: int = SIDE) -> None:
    """Write a 16-bit PNG of one color (Pillow writes none but grey): 2 channels with alpha, 3, or 4 with alpha."""
    row = b"\0" + struct.pack(">H", value) * side * channels
    header = struct.pack(">IIBBBBB", side, side, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * side, 1)), (b"IEND", b""))
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def turned() -> Image.Exif:
    """Return the EXIF data of an image that lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


KINDS: dict[str, Callable[[Path], None]] = {
    **{f"{mode}.png": plain(mode) for mode in ("1", "L", "P", "LA", "RGB", "RGBA")},
    "palette.png": plain("P", transparency=bytes(range(256))),
    "16.png": sixteen_bits(),
    "16-rgb.png": lambda path: png_16(path, 3),
    "16-rgba.png": lambda path: png_16(path, 4),
    "turned.png": plain("RGB", exif=turned()),
    "turned-16.png": sixteen_bits(exif=turned()),
    "RGB.jpg": plain("RGB"),
    "CMYK.jpg": plain("CMYK"),
    "progressive.jpg": plain("RGB", progressive=True, subsampling=0),
    "turned.jpg": plain("RGB", exif=turned()),
    **{f"{mode}.tif": plain(mode, compression="tiff_lzw") for mode in ("L", "RGB", "CMYK")},
    "raw.tif": plain("RGB"),
    "strip.tif": plain("RGB", compression="tiff_deflate", tiffinfo={278: SIDE}),
    "16.tif": sixteen_bits(compression="tiff_deflate"),
    "RGB.bmp": plain("RGB"),
    "RGB.ppm": plain("RGB"),
    "P.gif": plain("P"),
    **{f"{mode}.webp": plain(mode, lossless=True, method=0) for mode in ("RGB", "RGBA")},
    **{f"{mode}.avif": plain(mode, speed=10, subsampling="4:4:4") for mode in ("RGB", "RGBA")},
    **{f"{mode}.jp2": plain(mode) for mode in ("L", "RGB", "RGBA")},
    "16.jp2": sixteen_bits(),
}


def peak_mb() -> float:
    """Return the most memory that this process ever had, MB; that of getrusage begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def measure(path: Path, size: int | None) -> tuple[float, float]:
    """Return the memory that decoding a file took and its bound, MB."""
    bounds: list[int] = []
    inner = module.decode_bytes_needed

    def bound(*given: Any) -> int:
        bounds.append(inner(*given))
        return bounds[-1]

    small = path.parent / f"small{path.suffix}"
    Image.new("RGB", (8, 8)).save(small)
    module.decode(small)
    module.decode_bytes_needed = bound
    before = peak_mb()
    module.decode(path, 3, size)
    return peak_mb() - before, bounds[-1] / 1e6


def main() -> None:
    """Measure each kind in a process of its own."""
    if len(sys.argv) > 1:
        print(*measure(Path(sys.argv[1]), int(sys.argv[2]) or None))
        return
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, save in KINDS.items():
            path = Path(folder) / name
            save(path)
            for size in (0, 96) if name.endswith(".jpg") else (0,):
                command = [sys.executable, __file__, str(path), str(size)]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                peak, limit = map(float, result.stdout.split())
                ok = peak <= limit + BYTES_OF_PROCESS / 1e6
                failed += not ok
                verdict = "" if ok else "MORE THAN ALLOWED"
                smaller = f" at {size}" if size else ""
                print(f"{name + smaller:22} {peak:7.1f} MB, bound {limit:7.1f} MB {verdict}", flush=True)
            path.unlink()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
