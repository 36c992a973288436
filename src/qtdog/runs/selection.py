"""Model selection: which checkpoint is saved, and what each way to select gives, from the records of a run.

`source` and `last` get records from which the target is absent, so that they cannot look at it; only `oracle` gets
whole records (DomainBed's test-domain validation: an upper bound, never an honest result).
"""

from __future__ import annotations

import math
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
    """Return the last step that may be saved; None if there is none."""
    return max((record.step for record in records if record.selectable), default=None)


def select_oracle(records: Sequence[Record]) -> int | None:
    """Return the step with the highest accuracy on the *target*, ties to the earlier; None without a target."""
    usable = [(record.test_accuracy, -record.seen.step) for record in records if record.seen.selectable]
    best = max(((accuracy, step) for accuracy, step in usable if accuracy is not None), default=None)
    return None if best is None else -best[1]


def select(method: str, records: Sequence[Record]) -> int | None:
    """Return the step that `method` (`source`, `last` or `oracle`) selects among `records`.

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
    "source": "the evaluation with the best mean accuracy on the validation splits of the sources (training-domain "
    "validation); the target plays no part",
    "mean": "the mean over all evaluations after the start step (in float: after 40 % of the steps), because a single "
    "checkpoint swings; no model is selected",
    "last": "the last evaluation; nothing is selected",
    "oracle": "the evaluation that is best on the 20 % split of the unseen domain itself (of DomainBed's runs the last "
    "one, as its tools have it): an upper bound, never an honest result",
    "leave-one-out": "the evaluation that is best when each source domain is left out in turn (leave-one-domain-out "
    "validation); only DomainBed's runs with two unseen domains allow it",
}
WINDOW = (
    "Only evaluations after the start step are selected from, in float those after 40 % of the steps; DomainBed's runs "
    "select from all, as its tools do."
)


def check_selections(names: Sequence[str]) -> list[str]:
    """Return the names in the order of `SELECTIONS`; all of them if none is given.

    Raises:
        ConfigError: an unknown name, with the nearest one.
    """
    for name in names:
        if name not in SELECTIONS:
            raise ConfigError(unknown("selection", name, SELECTIONS))
    return [name for name in SELECTIONS if name in names or not names]


def apply_selection(run: FinishedRun, selection: str) -> Selected | None:
    """Return what `selection` gives for a run; None if that was not measured.

    The selection that the run itself was made with gives what its model file measured: with some averagers, and after
    post-training quantization, that is no network of any evaluation. Only where a float run saved a checkpoint from
    before the window that quantized runs select from, it is selected anew in that window.

    Args:
        run: a finished run.
        selection: a name of `SELECTIONS`.
    """
    if selection == run.selection and not saved_too_early(run):
        return run.saved
    if not run.records or not run.records_match:
        return None
    window = [record for record in run.records if record.seen.step > run.select_from]
    if selection == "mean":
        return _mean([record for record in run.records if record.seen.step > run.mean_from])
    if selection == "oracle":
        return _oracle(run, window)
    if selection == "leave-one-out":
        step = max(run.left_out, key=lambda one: (run.left_out[one], -one), default=None)
    else:
        step = select(selection, window)
    return next((_of(run, record, selection) for record in window if record.seen.step == step), None)


def saved_too_early(run: FinishedRun) -> bool:
    """Return whether the model file is a checkpoint from before the window that tables select from."""
    return (
        run.records_match
        and run.saved is not None
        and run.saved.step is not None
        and bool(run.records)
        and (run.saved.step <= run.select_from)
    )


def why_unmeasured(run: FinishedRun, selection: str) -> str:
    """Return why `apply_selection` gives nothing for a run."""
    if run.kind == "ensemble":
        return "ensembles, measured with the checkpoints of their members alone"
    if selection == "leave-one-out":
        return "without runs in which each source domain is left out too"
    if not run.records_match or not run.records:
        return "whose evaluations are not of what they save (averaged or quantized after training)"
    return "without such an evaluation"


def _oracle(run: FinishedRun, window: Sequence[Record]) -> Selected | None:
    if not window or window[0].test_accuracy is None:
        return None
    if run.kind == "domainbed":
        return _of(run, max(window, key=lambda record: record.seen.step), "oracle")
    usable = [record for record in window if record.seen.selectable]
    scores = {record.seen.step: run.target_20.get(record.seen.step, record.test_accuracy) or 0.0 for record in usable}
    best = max(usable, key=lambda record: (scores[record.seen.step], -record.seen.step), default=None)
    return None if best is None else _of(run, best, "oracle")


def _of(run: FinishedRun, record: Record, selection: str) -> Selected:
    test_80 = [score.accuracy for score in record.test_in.values()]
    source, step = record.seen.source_accuracy, record.seen.step
    scores = {"oracle": run.target_20.get(step, record.test_accuracy), "leave-one-out": run.left_out.get(step)}
    mean_80 = sum(test_80) / len(test_80) if test_80 else None
    return Selected(step, source, record.test_accuracy, mean_80, scores.get(selection, source))


def _mean(records: Sequence[Record]) -> Selected | None:
    """Return the mean over evaluations; None if there is none, or one of them could not be saved (INQ)."""
    if not records or not all(record.seen.selectable for record in records):
        return None
    sources = [record.seen.source_accuracy for record in records]
    targets = [record.test_accuracy for record in records]
    on_80 = [
        sum(part.accuracy for part in record.test_in.values()) / len(record.test_in)
        for record in records
        if record.test_in
    ]
    source, target, target_80 = (_mean_of(part, len(records)) for part in (sources, targets, on_80))
    return Selected(None, source, target, target_80, source)


def _mean_of(values: Sequence[float | None], n: int) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / n if len(known) == n else None
