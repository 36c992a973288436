"""The real benchmark, where it is at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize

from qtdog.data.augment import augment, draw_parameters
from qtdog.data.augment_on_device import augment_on_device
from qtdog.data.cards import PACS, check_counts
from qtdog.data.decode import decode_resized
from qtdog.data.image_folder import FileDataset, open_folder
from qtdog.data.splits import make_splits

ROOT = Path(os.environ.get("QTDOG_DATA") or Path(__file__).parents[3] / "shared" / "data") / "pacs"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"PACS is not at {ROOT}; set QTDOG_DATA to its parent folder")


@pytest.fixture(scope="module")
def pacs() -> FileDataset:
    return open_folder(ROOT)


def test_it_is_recognized_and_complete(pacs: FileDataset) -> None:
    assert pacs.card == PACS
    assert check_counts(pacs) == []
    assert pacs.missing_classes() == []


def test_splits_have_domainbeds_sizes(pacs: FileDataset) -> None:
    splits = make_splits(pacs)
    sizes = {domain: (len(splits[domain].train), len(splits[domain].heldout)) for domain in pacs.domains}
    assert sizes == {"art_painting": (1639, 409), "cartoon": (1876, 468), "photo": (1336, 334), "sketch": (3144, 785)}


def test_pixels_equal_domainbeds_evaluation_transform(pacs: FileDataset) -> None:
    for i in range(0, len(pacs), 1500):
        with Image.open(pacs.path(i)) as image:
            expected = Resize([224, 224])(image.convert("RGB"))
        assert np.array_equal(pacs.read_resized(i, 224), np.asarray(expected))


def test_photographs_are_augmented_on_a_device_as_on_the_cpu(pacs: FileDataset) -> None:
    paths = sorted(ROOT.rglob("*.jpg"))[::400]
    images = torch.stack([torch.from_numpy(decode_resized(path, 96).copy()) for path in paths])
    drawn = draw_parameters(torch.Generator().manual_seed(2), len(images), 96)
    options = {"size": 96, "mean": (0.0,), "std": (1.0,)}
    off = 255 * (augment_on_device(images, drawn, **options) - augment(images, drawn)).abs()
    assert off.mean() < 0.05
    assert (off > 2.5).float().mean() < 0.001
