"""The datasheet of a data set: what it is, where it comes from, what must be in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
        metric: the number that is reported.
        channels: 3 (RGB) or 1 (grey).
        augment: the training augmentation that suits it.
        preset: the configuration preset to use when the user names none.

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
    metric: str = "accuracy"
    channels: int = 3
    augment: Literal["domainbed", "none"] = "domainbed"
    preset: str | None = None
