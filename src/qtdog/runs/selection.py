"""Model selection: which checkpoint is kept, and what each way to select gives, from the records of a run.

`source` and `last` get records from which the target is absent, so that they cannot look at it; only `oracle` gets
whole records (DomainBed's test-domain validation: an upper bound, never an honest result).
"""

from __future__ import annotations

from collections.abc import Sequence

from qtdog.core.errors import ConfigError, unknown
from qtdog.runs.finished import FinishedRun, Selected
from qtdog.runs.record import Record, SourceRecord


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


SELECTIONS = {
    "source": "the evaluation with the best mean accuracy on the held-out part of the sources (training-domain "
    "validation); the target plays no part",
    "mean": "the mean over all evaluations after the start step (in float: after 40 % of the steps), because a single "
    "checkpoint swings; no model is chosen",
    "last": "the last evaluation; nothing is chosen",
    "oracle": "the evaluation that is best on the unseen domain itself: an upper bound, never an honest result",
}


def check_selections(names: Sequence[str]) -> list[str]:
    """Return the names in the order of `SELECTIONS`; all of them if none is given.

    Raises:
        ConfigError: an unknown name, with the nearest one.
    """
    for name in names:
        if name not in SELECTIONS:
            raise ConfigError(unknown("selection", name, SELECTIONS))
    return [name for name in SELECTIONS if name in names or not names]


def apply_selection(entry: FinishedRun, selection: str) -> Selected | None:
    """Return what `selection` gives for an entry; None if that was not measured.

    The way in which the run chose what it ships gives what was shipped: with some averagers, and after quantization
    after training, that is no network of any evaluation.

    Args:
        entry: a finished run.
        selection: a name of `SELECTIONS`.
    """
    if selection == entry.selection:
        return entry.shipped
    if not entry.records:
        return None
    if selection == "mean":
        return _mean([record for record in entry.records if _counts(record, entry.mean_from)])
    if selection == "oracle" and entry.records[0].test_accuracy is None:
        return None
    step = select(selection, entry.records)
    chosen = [record for record in entry.records if record.seen.step == step]
    return _of(chosen[0]) if chosen else None


def _counts(record: Record, start: int) -> bool:
    return record.seen.selectable and record.seen.step > start


def _of(record: Record) -> Selected:
    test_80 = [score.accuracy for score in record.test_in.values()]
    return Selected(
        record.seen.step,
        record.seen.source_accuracy,
        record.test_accuracy,
        sum(test_80) / len(test_80) if test_80 else None,
    )


def _mean(records: Sequence[Record]) -> Selected | None:
    if not records:
        return None
    all_of = [_of(record) for record in records]
    values = ([getattr(one, name) for one in all_of] for name in ("source", "target", "target_80"))
    source, target, target_80 = (None if None in part else sum(part) / len(part) for part in values)
    return Selected(None, source, target, target_80)
