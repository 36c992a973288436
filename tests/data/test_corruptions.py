"""Corruptions: golden images, the strength of each severity, and independence from the batch.

`golden/corruptions.png` was written with `python tests/data/test_corruptions.py`: a row per corruption, a column per
severity, of a synthetic 32 × 32 image.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qtdog.core.errors import ConfigError
from qtdog.data.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, CorruptedCache, corrupt, corruption_names
from qtdog.data.decoded_cache import open_cache
from qtdog.data.image_folder import open_folder

GOLDEN = Path(__file__).parent / "golden" / "corruptions.png"
NAMES = corruption_names(["all"])
SIZE = 32


def picture(size: int = SIZE) -> Tensor:
    """Return one image (1, 3, size, size) with an edge, a gradient and a disk."""
    y, x = torch.meshgrid(torch.arange(size) * 32 / size, torch.arange(size) * 32 / size, indexing="ij")
    red = (x * 8).to(torch.uint8)
    green = torch.where((x - 16) ** 2 + (y - 16) ** 2 < 81, 220, 40).to(torch.uint8)
    blue = torch.where(y < 10, 30, 160).to(torch.uint8)
    return torch.stack([red, green, blue])[None]


def sheet() -> np.ndarray:
    rows = [torch.cat([corrupt(picture(), name, s, keys=[5])[0] for s in SEVERITIES], dim=2) for name in NAMES]
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()


def test_images_are_those_that_were_kept():
    kept = np.array(Image.open(GOLDEN)).astype(int)
    differ = np.abs(sheet().astype(int) - kept)
    assert differ.max() <= 12  # JPEG and rounding differ a little between library versions
    assert differ.mean() < 0.1


def test_every_corruption_is_in_one_family():
    assert sorted(name for family in FAMILIES.values() for name in family) == list(CORRUPTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_corrupted_alike_in_every_batch(name: str):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 24, 20), dtype=torch.uint8, generator=generator)
    together = corrupt(images, name, 3, seed=1, keys=[4, 9, 2])
    alone = torch.cat([corrupt(images[i : i + 1], name, 3, seed=1, keys=[key]) for i, key in enumerate((4, 9, 2))])
    assert torch.equal(together, alone)
    assert together.shape == images.shape
    assert together.dtype == torch.uint8


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"elastic"}))  # its low severities stretch, its high ones crumple
def test_a_higher_severity_is_farther_from_the_image(name: str):
    image = picture(100)
    clean = image.to(torch.float32)
    errors = [(corrupt(image, name, s, keys=[0]).to(torch.float32) - clean).square().mean() for s in SEVERITIES]
    assert errors[-1] > 1.2 * errors[0] > 0


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_has_the_published_deviation(severity: int):
    gray = torch.full((1, 3, 200, 200), 128, dtype=torch.uint8)
    noisy = corrupt(gray, "gaussian_noise", severity, keys=[0])[0].to(torch.float64) / 255
    inside = noisy[(noisy > 0) & (noisy < 1)]
    expected = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    if severity < 3:  # stronger noise is cut off at black and white
        assert inside.std().item() == pytest.approx(expected, rel=0.02)
    black_or_white = ((noisy == 0) | (noisy == 1)).double().mean().item()
    assert black_or_white == pytest.approx(2 * torch.special.ndtr(torch.tensor(-0.5 / expected)).item(), abs=0.01)


def test_impulse_noise_hits_the_published_share():
    gray = torch.full((1, 1, 300, 300), 100, dtype=torch.uint8)
    hit = corrupt(gray, "impulse_noise", 5, keys=[0]) != 100
    assert hit.double().mean().item() == pytest.approx(0.27, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_gray_images_stay_gray(name: str):
    assert corrupt(picture()[:, :1], name, 4, keys=[0]).shape == (1, 1, SIZE, SIZE)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_of_corrupted_images_corrupts_images(name: str, image_tree: Path, tmp_path: Path):
    """The cache keeps channels last, corruptions take them first: mistaken for rows, a blur would mix the colors."""
    clean = open_cache(open_folder(image_tree), 24, folder=tmp_path)
    indices = np.array([3, 0, 5])
    images = torch.from_numpy(np.asarray(clean.gather(indices))).permute(0, 3, 1, 2)
    expected = corrupt(images, name, 4, seed=2, keys=[3, 0, 5])
    corrupted = CorruptedCache(clean, name, 4, seed=2)
    assert torch.equal(corrupted.gather(indices), expected.permute(0, 2, 3, 1))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    inputs = corrupted.network_inputs(indices, mean, std)
    torch.testing.assert_close(inputs, (expected / 255 - shift) / scale, rtol=0, atol=1e-5)


def test_blur_and_geometry_keep_a_flat_image():
    flat = torch.full((1, 3, 40, 40), 90, dtype=torch.uint8)
    for name in ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "pixelate", "elastic", "contrast"):
        assert (corrupt(flat, name, 5, keys=[0]).int() - 90).abs().max() <= 1, name


def test_an_unknown_name_or_severity_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="fog"):
        corruption_names(["fogg"])
    with pytest.raises(ConfigError, match="severity 6"):
        corrupt(picture(), "fog", 6, keys=[0])


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    Image.fromarray(sheet()).save(GOLDEN)
