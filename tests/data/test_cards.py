from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtdog.api.datasets import SequenceDataset
from qtdog.core.errors import ConfigError
from qtdog.data.cards import CARDS, PACS, card_for, check_counts, match_card
from qtdog.data.image_folder import open_folder


def test_cards_are_complete() -> None:
    for name in CARDS:
        card = CARDS[name]
        assert card.name == name
        assert list(card.domains or ()) == sorted(card.domains or ()) == sorted(card.expected_counts or ())
        assert list(card.classes or ()) == sorted(card.classes or ())
        assert card.licence != "unknown"
        assert card.paper


def test_pacs_has_its_published_size() -> None:
    assert sum((PACS.expected_counts or {}).values()) == 9991


def test_an_unknown_card_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'pacs'"):
        CARDS["pcas"]


def test_a_card_needs_all_domains_and_classes() -> None:
    assert match_card(PACS.domains or (), PACS.classes or ()) == PACS
    assert match_card((PACS.domains or ())[1:], PACS.classes or ()) is None


def test_a_folder_with_the_names_of_a_benchmark_and_other_images_keeps_its_own_name(tmp_path: Path) -> None:
    for domain in PACS.domains or ():
        for name in PACS.classes or ():
            (tmp_path / "mine" / domain / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "mine" / domain / name / "0.png")
    dataset = open_folder(tmp_path / "mine")
    assert dataset.card.name == "mine"
    assert dataset.card.title == "Images in the folder mine, with the domains and classes of pacs"
    assert dataset.card.steps == PACS.steps
    assert "domain sketch has 7 images, the dataset card says 3,929" in check_counts(dataset)


def test_a_folder_with_the_images_of_a_benchmark_has_its_card() -> None:
    domains, classes = PACS.domains or (), PACS.classes or ()
    counts = [(PACS.expected_counts or {})[domain] for domain in domains]
    places = [(d, i % len(classes)) for d, n in enumerate(counts) for i in range(n)]
    pixel = np.zeros((8, 8, 3), dtype=np.uint8)
    dataset = SequenceDataset(
        "mine", lambda i: pixel, [classes[c] for _, c in places], [domains[d] for d, _ in places], channels=3
    )
    assert card_for(dataset) == PACS


def test_differences_are_sentences(image_tree: Path) -> None:
    dataset = open_folder(image_tree)
    assert check_counts(dataset) == []
    dataset.card = PACS
    differences = check_counts(dataset)
    assert "domain sketch is missing" in differences
    assert "domain night is not in the dataset card" in differences
    assert "class bird is not in the dataset card" in differences
    assert len(differences) == 4 + 3 + 6 + 2


def test_a_count_that_nobody_confirmed_is_told_as_such(image_tree: Path) -> None:
    assert [name for name in CARDS if not CARDS[name].counts_from] == ["amazon-reviews"]
    dataset = open_folder(image_tree)
    for source, doubt in (("", True), ("a paper", False)):
        counts = {"night": 17, "indoor": 18, "outdoor": 18}
        dataset.card = replace(dataset.card, expected_counts=counts, expected_total=53, counts_from=source)
        differences = check_counts(dataset)
        assert len(differences) == 2
        assert all(("not compared with another source" in text) is doubt for text in differences)
