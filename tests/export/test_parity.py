from pathlib import Path

import numpy as np
import pytest

from qtdog.core.errors import ConfigError, DataError
from qtdog.data.image_folder import open_folder
from qtdog.export.parity import Draw, draw_images
from qtdog.training.load_model import ModelInfo, Preprocessing

INFO = ModelInfo(
    backbone="test_resnet",
    classes=("dog", "cat", "bird"),
    preprocessing=Preprocessing(image_size=8, channels=3, mean=(0, 0, 0), std=(1, 1, 1)),
    source_domains=("indoor", "night"),
    target_domain="outdoor",
    accuracy={},
    pretraining="none",
    bits=7,
    step=0,
    config_hash="",
)


def test_images_come_from_the_sources_alone_evenly_and_the_same_again(image_tree: Path):
    dataset = open_folder(image_tree)
    found = draw_images(dataset, INFO, Draw(10))
    assert found.domains == ("indoor", "night")
    assert found.pixels.shape == (10, 8, 8, 3)
    assert not found.target_included
    again = draw_images(dataset, INFO, Draw(10))
    assert np.array_equal(found.pixels, again.pixels)
    assert not np.array_equal(found.pixels, draw_images(dataset, INFO, Draw(10, seed=1)).pixels)


def test_a_change_in_the_target_changes_no_calibration(image_tree: Path):
    before = draw_images(open_folder(image_tree), INFO, Draw(10))
    for path in (image_tree / "outdoor").rglob("*.png"):
        path.write_bytes((image_tree / "night" / "cat" / "0.png").read_bytes())
    after = draw_images(open_folder(image_tree), INFO, Draw(10))
    assert np.array_equal(before.pixels, after.pixels)


def test_labels_follow_the_order_of_the_model(image_tree: Path):
    found = draw_images(open_folder(image_tree), INFO, Draw(100))
    # the tree paints birds red, cats green and dogs blue; the model's order is dog, cat, bird
    channel = found.pixels.mean((1, 2)).argmax(1)
    assert np.array_equal(2 - channel, found.labels)


@pytest.mark.parametrize("draw", [Draw(4, domains=("outdoor",)), Draw(4, domains=("night", "outdoor"))])
def test_the_target_is_refused_unless_forced(draw: Draw, image_tree: Path):
    dataset = open_folder(image_tree)
    with pytest.raises(ConfigError, match=r"'outdoor' was held out in training.*indoor, night, or --force-target"):
        draw_images(dataset, INFO, draw)
    forced = draw_images(dataset, INFO, Draw(4, domains=draw.domains, force_target=True))
    assert forced.target_included


def test_a_folder_of_the_target_alone_is_refused_too(image_tree: Path):
    for name in ("indoor", "night"):
        (image_tree / name).rename(image_tree.parent / name)
    dataset = open_folder(image_tree, min_domains=1)
    with pytest.raises(ConfigError, match="held out in training"):
        draw_images(dataset, INFO, Draw(4))
    assert draw_images(dataset, INFO, Draw(4, force_target=True)).domains == ("outdoor",)


def test_strange_domains_and_classes_are_refused_with_the_nearest_name(image_tree: Path):
    with pytest.raises(ConfigError, match="unknown domain 'nigth'; did you mean 'night'"):
        draw_images(open_folder(image_tree), INFO, Draw(4, domains=("nigth",)))
    (image_tree / "night" / "cat").rename(image_tree / "night" / "cats")
    with pytest.raises(DataError, match="unknown class 'cats'; did you mean 'cat'"):
        draw_images(open_folder(image_tree), INFO, Draw(100))
    for name in ("indoor", "night", "outdoor"):
        (image_tree / name).rename(image_tree / f"new_{name}")
    with pytest.raises(DataError, match="trained on indoor, night"):
        draw_images(open_folder(image_tree), INFO, Draw(4))
