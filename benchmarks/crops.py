"""Statistics of training crops: torchvision's RandomResizedCrop of the originals against both values of `data.crop`.

    python benchmarks/crops.py [--data PATH] [--images 500] [--json FILE]

For each image and each of a few draws: the squeeze (aspect of the result's content, as max(w, h) / min(w, h) of the
crop in pixels of the original), the area of the crop as a share of the image, and the sharpness of the result (mean
absolute difference of neighbors of the grey image in [0, 1]). Flip and color jitter are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from qtdog.data.augment import AugmentParameters, augment, draw_parameters
from qtdog.data.dataset import ImageSubset
from qtdog.data.decoded_cache import open_cache
from qtdog.data.image_folder import open_folder
from qtdog.data.original_cache import open_originals

LUMA = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]


def sharpness(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours of the grey image, (n,), of images (n, 3, H, W) in [0, 1]."""
    grey = (images * LUMA).sum(1)
    return (grey.diff(dim=1).abs().mean((1, 2)) + grey.diff(dim=2).abs().mean((1, 2))) / 2


def only_crops(crop: Tensor) -> AugmentParameters:
    """Return parameters that crop and change nothing else."""
    n = len(crop)
    still = torch.zeros(n, dtype=torch.bool)
    return AugmentParameters(
        crop, still, torch.tensor([1.0, 1, 1, 0]).repeat(n, 1), torch.arange(4).repeat(n, 1), still
    )


def statistics(crops: Tensor, scale: Tensor, native: Tensor, results: Tensor) -> dict[str, Tensor]:
    """Return squeeze, area and sharpness of each crop; `scale` is pixels of the original per pixel of the crop."""
    extent = crops[:, 2:].double() * scale
    height, width = extent.unbind(1)
    return {
        "squeeze": torch.maximum(height, width) / torch.minimum(height, width),
        "area": extent.prod(1) / native.prod(1),
        "sharpness": sharpness(results),
    }


def measure(dataset: ImageSubset, size: int, draws: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return the mean of each statistic for torchvision and both kinds of crop."""
    cached, originals = open_cache(dataset, size, folder=folder), open_originals(dataset, size, folder=folder)
    found: dict[str, list[dict[str, Tensor]]] = {"torchvision": [], "original": [], "cached": []}
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for i in range(len(dataset)):
        image = torch.tensor(dataset.read(i)).permute(2, 0, 1)
        native = torch.tensor([image.shape[1:]] * draws)
        boxes = [RandomResizedCrop.get_params(image, [0.7, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)]
        theirs = torch.stack([resized_crop(image, *box, size=[size, size], antialias=True) for box in boxes]) / 255
        found["torchvision"].append(statistics(torch.tensor(boxes), torch.ones(draws, 2), native, theirs))
        kept, square = originals.sizes[i].repeat(draws, 1), torch.full((draws, 2), size)
        # of a very long image the cache holds the middle, so that its shorter side tells the scale
        both = (native.amin(1) / kept.amin(1))[:, None].expand(-1, 2)
        for name, sizes, scale, images in (
            ("original", kept, both, originals.gather([i] * draws)),
            ("cached", square, native / size, cached.gather([i] * draws)),
        ):
            crop = draw_parameters(generator, draws, sizes).crop
            found[name].append(statistics(crop, scale, native, augment(images, only_crops(crop), size=size)))
    return {name: _means(rows) for name, rows in found.items()}


def _means(rows: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean over all crops, and its standard error over images."""
    result = {}
    for key in rows[0]:
        by_image = torch.stack([row[key].double().mean() for row in rows])
        result[key] = round(by_image.mean().item(), 5)
        result[f"{key}_se"] = round((by_image.std() / len(rows) ** 0.5).item(), 5)
    result["area_sd"] = round(torch.cat([row["area"] for row in rows]).double().std().item(), 5)
    return result


def main() -> None:
    """Measure at each size and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--data", type=Path, help="ROOT/DOMAIN/CLASS/image; default: 60 synthetic images of many shapes"
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--domain", default="", help="images of this domain alone")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.data or make_images(Path(temporary) / "images")
        run(options, root, Path(temporary) / "cache")


def make_images(root: Path) -> Path:
    """Write images with smooth areas and a fine grain, of 100 to 600 pixels in each direction."""
    rng = np.random.default_rng(0)
    for i in range(60):
        height, width = rng.integers(100, 601, 2).tolist()
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height))
        pixels = np.asarray(coarse) + rng.normal(0, 8, (height, width, 3))
        folder = root / "ab"[i % 2] / "xy"[i // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def run(options: argparse.Namespace, root: Path, folder: Path) -> None:
    """Measure and print."""
    whole = open_folder(root)
    pool = whole.indices(options.domain) if options.domain else np.arange(len(whole))
    chosen = np.sort(np.random.default_rng(0).choice(pool, min(options.images, len(pool)), replace=False))
    dataset = ImageSubset(whole, chosen, list(range(len(whole.domains))), whole.card)
    results: dict[str, Any] = {}
    for size in options.sizes:
        results[str(size)] = measure(dataset, size, options.draws, folder)
        print(f"{size} px, {len(dataset)} images, {options.draws} crops each")
        for name, row in results[str(size)].items():
            print(f"  {name:12}" + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
    text = json.dumps({"n_images": len(dataset), "draws": options.draws, "results": results})
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
