"""Benchmark data sets that are known by name: their datasheets, and whether a folder holds what they promise.

Each is a file `benchmarks/NAME.yaml` beside this one with the attributes of `Datasheet`: a new one is just a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from qtdog.core.registry import Registry
from qtdog.data.sheet import Archive, Datasheet

if TYPE_CHECKING:
    from qtdog.data.dataset import DomainDataset
    from qtdog.data.text import TextDataset

CARDS: Registry[Datasheet] = Registry("data set")
UNCHECKED = "a count that was not compared with another source: the copy may be right"
FOLDER_KINDS = ("folders", "listed-folders", "camera-traps")
"""Those that lie on disk as ROOT/DOMAIN/CLASS/image, whatever they were downloaded as."""

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
        counts_from="the division is made here",
        channels=1,
        augment="none",
        preset="digits",
    ),
)


def read_card(text: str) -> Datasheet:
    """Return the datasheet that a YAML text describes.

    Example:
        >>> read_card("{name: birds, title: Birds, domains: [north, south]}").domains
        ('north', 'south')
    """
    # the C parser where there is one: DomainNet has 345 classes, and every command waits for this
    tree: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for key in ("domains", "classes"):
        if key in tree:
            tree[key] = tuple(tree[key])
    tree["archives"] = tuple(
        Archive(**archive | {"urls": tuple(archive["urls"])}) for archive in tree.get("archives", ())
    )
    return Datasheet(**tree)


for _file in sorted((resources.files("qtdog") / "data" / "benchmarks").iterdir(), key=lambda file: file.name):
    if _file.name.endswith(".yaml"):
        CARDS.add(_file.name.removesuffix(".yaml"), read_card(_file.read_text(encoding="utf-8")))

PACS = CARDS["pacs"]


def match_card(domains: Iterable[str], classes: Iterable[str]) -> Datasheet | None:
    """Return the card of a data set of folders that has exactly these domains and classes, or None.

    Two versions of TerraIncognita differ in their counts alone: the one of the papers is meant.

    Example:
        >>> match_card(["photo", "sketch"], ["dog"]) is None
        True
    """
    found = tuple(sorted(domains)), tuple(sorted(classes))
    cards = [CARDS[name] for name in CARDS if CARDS[name].kind in FOLDER_KINDS]
    matching = [card for card in cards if (card.domains, card.classes) == found]
    return matching[-1] if matching else None


def check_counts(dataset: DomainDataset | TextDataset) -> list[str]:
    """Return one sentence per difference between a data set and its datasheet; empty if it is as promised.

    A sentence about a count that nobody confirmed says so.
    """
    sheet = dataset.sheet
    doubt = "" if sheet.counts_from else f" ({UNCHECKED})"
    differences = _set_differences("domain", sheet.domains, dataset.domains)
    differences += _set_differences("class", sheet.classes, dataset.classes)
    found = dict(zip(dataset.domains, dataset.counts().sum(axis=1).tolist(), strict=True))
    for domain, expected in (sheet.expected_counts or {}).items():
        if domain in found and found[domain] != expected:
            differences.append(f"domain {domain} has {found[domain]:,} images, the datasheet says {expected:,}{doubt}")
    if sheet.expected_total not in (None, len(dataset)):
        differences.append(f"there are {len(dataset):,} in all, the datasheet says {sheet.expected_total:,}{doubt}")
    return differences


def _set_differences(what: str, expected: tuple[str, ...] | None, found: tuple[str, ...]) -> list[str]:
    if expected is None:
        return []
    missing = [f"{what} {name} is missing" for name in sorted(set(expected) - set(found))]
    return missing + [f"{what} {name} is not in the datasheet" for name in sorted(set(found) - set(expected))]
