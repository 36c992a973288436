"""Data sets of other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qtdog.api.datasets import SequenceDataset
from qtdog.core.errors import DataError


def grey(i: int) -> Image.Image:
    return Image.new("L", (6, 4), 10 * i)


def test_images_come_in_the_order_of_domains_and_classes():
    dataset = SequenceDataset("s", grey, ["b", "a", "b", "a"], [2, 1, 1, 2], channels=1)
    assert (dataset.domains, dataset.classes) == (("1", "2"), ("a", "b"))
    assert [int(dataset.read(i)[0, 0, 0]) for i in range(4)] == [10, 20, 30, 0]
    assert dataset.counts().tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    "given",
    [
        Image.new("RGBA", (6, 4), (70, 70, 70, 0)),
        Image.new("L", (6, 4), 70),
        Image.fromarray(np.full((4, 6), 70 * 256, dtype=np.uint16)),
        np.full((4, 6), 70, dtype=np.uint8),
        np.full((4, 6, 1), 70, dtype=np.uint8),
        torch.full((4, 6, 3), 70, dtype=torch.uint8),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_kinds_of_images(given, channels):
    pixels = SequenceDataset("s", lambda _: given, ["a"], ["x"], channels=channels).read(0)
    assert pixels.shape == (4, 6, channels)
    assert (pixels == 70).all()


def test_an_image_is_put_upright():
    image = Image.new("L", (6, 4), 70)
    image.getexif()[0x0112] = 6
    assert SequenceDataset("s", lambda _: image, ["a"], ["x"]).read(0).shape == (6, 4, 3)


def test_labels_may_be_numbers():
    labels = [torch.tensor(1), np.int64(0), 1]
    dataset = SequenceDataset("s", grey, labels, ["x", "y", "y"], classes=["cat", "dog"])
    assert [dataset.classes[c] for c in dataset.class_index] == ["dog", "cat", "dog"]


@pytest.mark.parametrize("labels", [[[0, 1], [1]], [{"a"}, {"b"}], torch.eye(2), np.eye(2)])
def test_several_labels_are_refused_with_a_clear_word(labels):
    with pytest.raises(DataError, match=r"several labels for one image \(multi-label\) are not supported"):
        SequenceDataset("s", grey, labels, ["x", "y"])


def test_wrong_lengths_and_images_are_said():
    with pytest.raises(DataError, match="s has 1 labels and 2 domains"):
        SequenceDataset("s", grey, ["a"], ["x", "y"])
    with pytest.raises(DataError, match="image 0 of s cannot be had: an image must be uint8"):
        SequenceDataset("s", lambda _: np.zeros((2, 2)), ["a"], ["x"]).read(0)
    with pytest.raises(DataError, match="image 0 of s cannot be had: broken"):
        SequenceDataset("s", lambda _: (_ for _ in ()).throw(OSError("broken")), ["a"], ["x"]).read(0)
