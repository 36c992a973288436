import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtdog.core.errors import ConfigError
from qtdog.runs import selection as module
from qtdog.runs.record import Record, Score, SourceRecord, merge_scores
from qtdog.runs.selection import select, select_last, select_source


def record(step: int, sources: list[float], target: float | None = None, *, selectable: bool = True) -> Record:
    source = {f"d{i}": Score(accuracy, 1.0, 10) for i, accuracy in enumerate(sources)}
    test = {} if target is None else {"t": Score(target, 1.0, 10)}
    return Record(SourceRecord(step, selectable, source), test, {}, 0.5)


def test_source_takes_the_best_mean_and_the_earlier_of_equals():
    records = [record(1, [0.5, 0.9]), record(2, [0.8, 0.8]), record(3, [0.9, 0.7])]
    assert select("source", records) == 2


def test_checkpoints_before_quantization_are_never_shipped():
    records = [record(1, [0.99], selectable=False), record(2, [0.5]), record(3, [0.4])]
    assert [select(method, records) for method in ("source", "last")] == [2, 3]
    assert select_source([r.seen for r in records[:1]]) is None
    assert select_last([r.seen for r in records[:1]]) is None


def test_only_oracle_follows_the_target():
    records = [record(1, [0.9], 0.1), record(2, [0.5], 0.8), record(3, [0.6], 0.8)]
    assert [select(method, records) for method in ("source", "last", "oracle")] == [1, 3, 2]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_honest_selection_cannot_see_the_target(rows):
    """Whatever the target's numbers are, the choice is the same; and the type it gets has no place for them."""
    honest = [record(i, [a, b], t) for i, (a, b, t) in enumerate(rows)]
    altered = [record(i, [a, b], 1 - t) for i, (a, b, t) in enumerate(rows)]
    for method in ("source", "last"):
        assert select(method, honest) == select(method, altered)


def test_the_type_that_selection_gets_has_no_target():
    for function in (module.select_source, module.select_last):
        annotation = inspect.signature(function).parameters["records"].annotation
        assert annotation == "Sequence[SourceRecord]"
    assert set(SourceRecord.__dataclass_fields__) == {"step", "selectable", "source"}


def test_oracle_without_a_target_is_refused():
    with pytest.raises(ConfigError, match="needs a target domain"):
        select("oracle", [record(1, [0.5])])


def test_each_domain_counts_once_whatever_its_size():
    source = {"small": Score(1.0, 0.0, 1), "large": Score(0.0, 0.0, 999)}
    assert SourceRecord(1, True, source).source_accuracy == 0.5


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=5))
def test_merged_score_is_that_of_all_images_together(parts):
    scores = [Score(min(correct, n) / n, float(correct), n) for correct, n in parts]
    merged = merge_scores(scores)
    assert merged.n == sum(n for _, n in parts)
    assert abs(merged.accuracy * merged.n - sum(min(correct, n) for correct, n in parts)) < 1e-9


def test_record_survives_json():
    original = record(3, [0.25, 0.5], 0.75)
    assert Record.from_json(original.to_json()) == original
    assert original.to_json()["source_accuracy"] == 0.375
