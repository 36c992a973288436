"""Make a folder of small images as four cameras would take them: ROOT/CAMERA/DIGIT/NUMBER.png. No download.

    python examples/make_photos.py photos/ --num 800

The tutorial of docs/tutorials/engineer.md trains on them. Each handwritten digit (scikit-learn's) goes to one camera.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

CAMERAS = ("day", "dusk", "grainy", "soft")


def photo(pixels: np.ndarray, camera: str, rng: np.random.Generator) -> Image.Image:
    """Return a digit (8 x 8, values 0 to 16) as a camera sees it, 24 x 24 pixels."""
    values = np.kron(pixels * 15.9, np.ones((3, 3)))
    if camera == "dusk":
        values = 20 + 0.35 * values
    if camera == "grainy":
        values = values + rng.normal(0, 45, values.shape)
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(2)) if camera == "soft" else image


def main() -> None:
    """Write the images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, default=800)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    digits = load_digits()
    for i in range(given.num):
        camera, label = CAMERAS[i // 10 % 4], int(digits.target[i])
        path = given.folder / camera / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(digits.images[i], camera, rng).save(path)
    print(f"{given.num} images of {len(CAMERAS)} cameras in {given.folder}")


if __name__ == "__main__":
    main()
