"""Which checkpoint is shipped: pure functions over records.

`source` and `last` get records from which the target is absent, so that they cannot look at it; only `oracle`, which is
named so, gets whole records (DomainBed's test-domain validation, an upper bound and never an honest result).
"""

from __future__ import annotations

from collections.abc import Sequence

from qtdog.core.errors import ConfigError
from qtdog.training.records import Record, SourceRecord


def select_source(records: Sequence[SourceRecord]) -> int | None:
    """Return the step with the highest mean source-validation accuracy, ties to the earlier; None if there is none.

    Source: training-domain validation, Gulrajani and Lopez-Paz, ICLR 2021, section 3.
    """
    usable = [record for record in records if record.selectable]
    return max(usable, key=lambda record: (record.source_accuracy, -record.step)).step if usable else None


def select_last(records: Sequence[SourceRecord]) -> int | None:
    """Return the last step that may be shipped; None if there is none."""
    return max((record.step for record in records if record.selectable), default=None)


def select_oracle(records: Sequence[Record]) -> int | None:
    """Return the step with the highest accuracy on the *target*, ties to the earlier; None without a target."""
    usable = [(record.test_accuracy, -record.seen.step) for record in records if record.seen.selectable]
    best = max(((accuracy, step) for accuracy, step in usable if accuracy is not None), default=None)
    return None if best is None else -best[1]


def select(method: str, records: Sequence[Record]) -> int | None:
    """Return the step that `method` (`source`, `last` or `oracle`) chooses among `records`.

    Raises:
        ConfigError: `oracle` without a target domain.
    """
    seen = [record.seen for record in records]
    if method == "oracle":
        if records and records[0].test_accuracy is None:
            raise ConfigError("train.selection=oracle needs a target domain; give --target DOMAIN or use source")
        return select_oracle(records)
    return select_last(seen) if method == "last" else select_source(seen)
