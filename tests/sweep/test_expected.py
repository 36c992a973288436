"""A study beside expected values: complete trials, ensembles, and runs that the sweep makes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qtdog.runs.folder import RunFolder
from qtdog.sweep.expected import ExpectedRow, compare_with_expected, expected_rows, row_lines, value_of
from qtdog.sweep.plan import Plan


def test_means_of_finished_runs_stand_beside_what_is_expected(
    make_tiny: Callable[..., Plan], running: SimpleNamespace, tmp_path: Path
):
    plan = make_tiny(
        set={"train.steps": 4},
        grid={"target": ["0", "75"], "trial, seed": "0..1"},
        methods={"lsq": {"presets": ["lsq"]}},
        ensembles=[{"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..1"}],
        expected={"lsq": {"unseen": 60, "unseen/75": 70}, "EoQ": 80, "other": 90},
        not_run={"other": "too large"},
    )
    rows = expected_rows(plan.study)
    before = compare_with_expected(plan, tmp_path, rows)
    assert [(line.method, line.ours, line.source) for line in before] == [
        ("lsq", None, "0 of 4 runs"),
        ("lsq", None, "0 of 2 runs"),
        ("EoQ", None, "0 of 2 ensembles of 2"),
        ("other", None, "too large"),
    ]
    running.in_this_process(plan, tmp_path)
    value = {}
    for task in plan.tasks:
        result = RunFolder(task.folder(tmp_path)).read_result()
        labels = task.labels[0]
        value[labels["method"], labels["target"], labels["trial, seed"]] = 100 * value_of(result or {}, "unseen")
    every, at_75, ensemble = compare_with_expected(plan, tmp_path, rows)[:3]
    trials = [(value["lsq", "0", seed] + value["lsq", "75", seed]) / 2 for seed in (0, 1)]
    assert every.ours is not None
    assert every.ours == pytest.approx(sum(trials) / 2)
    assert every.error == pytest.approx(abs(trials[0] - trials[1]) / 2 / 2**0.5)
    assert every.difference == pytest.approx(every.ours - 60)
    assert at_75.ours == pytest.approx((value["lsq", "75", 0] + value["lsq", "75", 1]) / 2)
    assert ensemble.ours == pytest.approx((value["EoQ", "0", 0] + value["EoQ", "75", 0]) / 2)
    first = compare_with_expected(plan, tmp_path, rows, n_trials=1)
    assert first[0].ours == pytest.approx(trials[0])


def test_a_trial_counts_when_all_its_targets_are_there():
    row = ExpectedRow("m", "m", {"unseen": 50.0, "unseen/a": 40.0})
    trials = [{"a": {"test_accuracy": 0.5}, "b": {"test_accuracy": 0.7}}, {"a": {"test_accuracy": 0.1}}]
    mean, one = row_lines(row, trials, n_targets=2)
    assert (mean.ours, mean.error, mean.source) == (pytest.approx(60), None, "3 of 4 runs")
    assert one.ours == pytest.approx(30)
    assert one.error == pytest.approx(20 / 2**0.5)  # DomainBed's: the population standard deviation, 20, over √n
    assert one.difference == pytest.approx(-10)


def test_a_mean_of_five_data_sets_is_not_compared_with_one():
    row = ExpectedRow("m", "m", {"mean_of_five": 70.0})
    (line,) = row_lines(row, [{"a": {"test_accuracy": 0.5}}], n_targets=1)
    assert (line.ours, line.difference) == (50.0, None)


def test_single_models_are_measured_on_the_published_part_and_ensembles_on_all():
    result = {"test_accuracy": 0.5, "test_accuracy_80": {"sketch": 0.25}, "source_accuracy": 0.9}
    assert value_of(result, "unseen") == 0.25
    assert value_of(result | {"members": []}, "unseen") == 0.5
    assert value_of(result, "source") == 0.9
    assert value_of({"test_accuracy": 0.5, "test_accuracy_80": {}}, "in_domain") == 0.5
