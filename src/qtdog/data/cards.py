"""Benchmark data sets that are known by name: their datasheets, and whether a folder holds what they promise."""

from __future__ import annotations

from collections.abc import Iterable

from qtdog.core.registry import Registry
from qtdog.data.dataset import DomainDataset
from qtdog.data.sheet import Datasheet

CARDS: Registry[Datasheet] = Registry("data set")

PACS = CARDS.add(
    "pacs",
    Datasheet(
        name="pacs",
        title="PACS: art paintings, cartoons, photos and sketches of seven classes",
        source="http://sketchx.eecs.qmul.ac.uk/downloads/ (the authors' page; images from Caltech256, Sketchy, "
        "TU-Berlin and Google Images)",
        licence="research use; the images belong to their owners and are not redistributed here",
        paper="Li, Yang, Song, Hospedales: Deeper, Broader and Artier Domain Generalization, ICCV 2017",
        domains=("art_painting", "cartoon", "photo", "sketch"),
        classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
        expected_counts={"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
    ),
)

ROTATED_DIGITS = CARDS.add(
    "rotated-digits",
    Datasheet(
        name="rotated-digits",
        title="Rotated digits: 1,797 handwritten digits, each rotated by one of six angles (degrees)",
        source="scikit-learn's load_digits (UCI optical recognition of handwritten digits, test set)",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        paper="Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI, 1998",
        domains=("0", "15", "30", "45", "60", "75"),
        classes=tuple("0123456789"),
        expected_counts={"0": 300, "15": 300, "30": 300, "45": 299, "60": 299, "75": 299},
        channels=1,
        augment="none",
        preset="digits",
    ),
)


def match_card(domains: Iterable[str], classes: Iterable[str]) -> Datasheet | None:
    """Return the card that has exactly these domains and classes, or None.

    Example:
        >>> match_card(["photo", "sketch"], ["dog"]) is None
        True
    """
    found = tuple(sorted(domains)), tuple(sorted(classes))
    return next((CARDS[name] for name in CARDS if (CARDS[name].domains, CARDS[name].classes) == found), None)


def check_counts(dataset: DomainDataset) -> list[str]:
    """Return one sentence per difference between a data set and its datasheet; empty if it is as promised."""
    sheet = dataset.sheet
    differences = _set_differences("domain", sheet.domains, dataset.domains)
    differences += _set_differences("class", sheet.classes, dataset.classes)
    found = dict(zip(dataset.domains, dataset.counts().sum(axis=1).tolist(), strict=True))
    for domain, expected in (sheet.expected_counts or {}).items():
        if domain in found and found[domain] != expected:
            differences.append(f"domain {domain} has {found[domain]:,} images, the datasheet says {expected:,}")
    return differences


def _set_differences(what: str, expected: tuple[str, ...] | None, found: tuple[str, ...]) -> list[str]:
    if expected is None:
        return []
    missing = [f"{what} {name} is missing" for name in sorted(set(expected) - set(found))]
    return missing + [f"{what} {name} is not in the datasheet" for name in sorted(set(found) - set(expected))]
