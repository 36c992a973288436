"""From what a user types after `--data` to a data set of images or of texts."""

from __future__ import annotations

from qtdog.data.dataset import DomainDataset
from qtdog.data.open import is_text, open_dataset, open_texts
from qtdog.data.text_domains import TextDomains


def open_any(source: str, *, min_domains: int = 2) -> DomainDataset:
    """Return the data set called `source`, of images (`data.open.open_dataset`) or of texts.

    Raises:
        DataError: as in `open_dataset` and `open_texts`.

    Example:
        >>> len(open_any("rotated-digits"))
        1797
    """
    return TextDomains(open_texts(source)) if is_text(source) else open_dataset(source, min_domains=min_domains)
