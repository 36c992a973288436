"""Dataset cards: what a data set is, where it comes from, what must be in it; the benchmarks that are known by name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from qtdog.core.registry import Registry

if TYPE_CHECKING:
    from qtdog.data.dataset import DomainDataset
    from qtdog.data.text import TextDataset


def data_root() -> Path:
    """Return the data home: $QTDOG_DATA, else $XDG_DATA_HOME/qtdog, else ~/.local/share/qtdog."""
    own = os.environ.get("QTDOG_DATA")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "qtdog"


Kind = Literal["folders", "listed-folders", "camera-traps", "colored-mnist", "rotated-mnist", "camelyon17", "reviews"]


MAX_ARCHIVE_BYTES = 32 * 2**30


@dataclass(frozen=True)
class Archive:
    """One file that a data set is downloaded as.

    Attributes:
        file: its name on disk; the ending says how it is packed (.zip, .tar, .tar.gz, …); others are kept as they are.
        urls: where it can be had, the best first. `gdrive:ID` means a file on Google Drive.
        sha256: of its content, or "" where nobody published it: the first complete download is remembered instead.
        max_bytes: a longer file is refused.

    Example:
        >>> Archive("birds.zip", ("https://example.org/birds.zip",)).sha256
        ''
    """

    file: str
    urls: tuple[str, ...]
    sha256: str = ""
    max_bytes: int = MAX_ARCHIVE_BYTES


@dataclass(frozen=True)
class DatasetCard:
    """What is known about a data set before a single image is read.

    Attributes:
        name: short name, as given to `--data` (or the folder's own name).
        title: one line for people.
        source: where the data comes from.
        licence: terms of use, in one line; "unknown" for a user's own folder.
        paper: the publication that introduced it, or "".
        domains: the domain names that it must have, sorted; None if any will do.
        classes: the class names that it must have, sorted; None if any will do.
        expected_counts: images per domain, or None if unknown.
        expected_total: images (or texts) in all, or None if unknown.
        counts_from: where these counts were compared with somebody else's, or "" if they were not.
        metric: the number that is reported.
        channels: 3 (RGB) or 1 (grey).
        augment: the training augmentation that suits it.
        preset: the configuration preset to use when the user names none.
        kind: how it lies on disk; "folders" is ROOT/DOMAIN/CLASS/image.
        archives: what it is downloaded as; empty if it cannot be downloaded.
        domain_aliases: other names that its domains go by in the wild → the name here.
        class_aliases: likewise of classes.
        steps: updates of the published protocol, or None if none is published for it.
        eval_every: steps between its evaluations, likewise.
        note: what else one should know.

    Example:
        >>> DatasetCard(name="birds", title="Birds").channels
        3
    """

    name: str
    title: str
    source: str = "a local folder"
    licence: str = "unknown"
    paper: str = ""
    domains: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    expected_counts: dict[str, int] | None = None
    expected_total: int | None = None
    counts_from: str = ""
    metric: str = "accuracy"
    channels: int = 3
    augment: Literal["domainbed", "none"] = "domainbed"
    preset: str | None = None
    kind: Kind = "folders"
    archives: tuple[Archive, ...] = ()
    domain_aliases: dict[str, str] = field(default_factory=dict)
    class_aliases: dict[str, str] = field(default_factory=dict)
    steps: int | None = None
    eval_every: int | None = None
    note: str = ""

    @property
    def n_expected(self) -> int | None:
        """Images (or texts) in all, or None if unknown."""
        return self.expected_total or (sum(self.expected_counts.values()) if self.expected_counts else None)


UNCHECKED = "a count that was not compared with another source: the copy may be right"
FOLDER_KINDS = ("folders", "listed-folders", "camera-traps")
"""Those that lie on disk as ROOT/DOMAIN/CLASS/image, whatever they were downloaded as."""

ROTATED_DIGITS = DatasetCard(
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
)


def read_card(text: str) -> DatasetCard:
    """Return the card that a YAML text describes.

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
    return DatasetCard(**tree)


def _shipped() -> dict[str, DatasetCard]:
    files = sorted((resources.files("qtdog") / "data" / "benchmarks").iterdir(), key=lambda file: file.name)
    cards = [file for file in files if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): read_card(file.read_text(encoding="utf-8")) for file in cards}


CARDS: Registry[DatasetCard] = Registry("data set", members={"rotated-digits": ROTATED_DIGITS, **_shipped()})
PACS = CARDS["pacs"]


def match_card(domains: Iterable[str], classes: Iterable[str]) -> DatasetCard | None:
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


def card_for(dataset: DomainDataset) -> DatasetCard:
    """Return the card for a folder or list of a user, which has a card of its own.

    It is that of a known data set if domains, classes and numbers of images are its. If the numbers differ, protocol
    and expected numbers are that data set's, and name and title stay the user's. Of two known versions with the same
    domains and classes the one whose numbers fit is meant.
    """
    own = dataset.card
    known = match_card(dataset.domains, dataset.classes)
    if known is None:
        return own
    names = known.domains, known.classes
    alike = [CARDS[name] for name in CARDS if (CARDS[name].domains, CARDS[name].classes) == names]
    fitting = [card for card in alike if card.kind in FOLDER_KINDS and not _count_differences(dataset, card)]
    if fitting:
        return fitting[-1]
    return replace(known, name=own.name, title=f"{own.title}, with the domains and classes of {known.name}")


def check_counts(dataset: DomainDataset | TextDataset) -> list[str]:
    """Return one sentence per difference between a data set and its card; empty if it is as promised.

    A sentence about a count that nobody confirmed says so.
    """
    card = dataset.card
    differences = _set_differences("domain", card.domains, dataset.domains)
    differences += _set_differences("class", card.classes, dataset.classes)
    return differences + _count_differences(dataset, card)


def _count_differences(dataset: DomainDataset | TextDataset, card: DatasetCard) -> list[str]:
    remark = "" if card.counts_from else f" ({UNCHECKED})"
    differences = []
    found = dict(zip(dataset.domains, dataset.counts().sum(axis=1).tolist(), strict=True))
    for domain, expected in (card.expected_counts or {}).items():
        if domain in found and found[domain] != expected:
            differences.append(
                f"domain {domain} has {found[domain]:,} images, the dataset card says {expected:,}{remark}"
            )
    if card.expected_total not in (None, len(dataset)):
        differences.append(f"there are {len(dataset):,} in all, the dataset card says {card.expected_total:,}{remark}")
    return differences


def _set_differences(what: str, expected: tuple[str, ...] | None, found: tuple[str, ...]) -> list[str]:
    if expected is None:
        return []
    missing = [f"{what} {name} is missing" for name in sorted(set(expected) - set(found))]
    return missing + [f"{what} {name} is not in the dataset card" for name in sorted(set(found) - set(expected))]
