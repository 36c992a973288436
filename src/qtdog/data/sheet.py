"""The datasheet of a data set: what it is, where it comes from, what must be in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["folders", "listed-folders", "camera-traps", "colored-mnist", "rotated-mnist", "camelyon17", "reviews"]


@dataclass(frozen=True)
class Archive:
    """One file that a data set is downloaded as.

    Attributes:
        file: its name on disk; the ending says how it is packed (.zip, .tar, .tar.gz, …); others are kept as they are.
        urls: where it can be had, the best first. `gdrive:ID` means a file on Google Drive.
        sha256: of its content, or "" where nobody published it: the first complete download is remembered instead.

    Example:
        >>> Archive("birds.zip", ("https://example.org/birds.zip",)).sha256
        ''
    """

    file: str
    urls: tuple[str, ...]
    sha256: str = ""


@dataclass(frozen=True)
class Datasheet:
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
        >>> Datasheet(name="birds", title="Birds").channels
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
