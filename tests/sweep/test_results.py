"""Tables of a study: what `qtdog table` says of the same runs, to the last digit; numbers beside expected ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qtdog.core.config_io import to_yaml
from qtdog.runs.aggregate import AVERAGE, aggregate
from qtdog.runs.find import find_runs
from qtdog.runs.folder import RunFolder
from qtdog.runs.statistics import average_over_targets, by_target
from qtdog.sweep.journal import save_labels
from qtdog.sweep.plan import Plan
from qtdog.sweep.results import (
    ExpectedRow,
    compare_with_expected,
    expected_rows,
    results,
    row_lines,
    targets_of,
    value_of,
    values,
)

TARGETS = ["0", "45", "75"]


@pytest.fixture
def measured(make_tiny: Callable[..., Plan], made: dict[str, Any], tmp_path: Path) -> tuple[Plan, Path]:
    """A study of three targets and two seeds whose runs have made-up numbers, and its folder."""
    plan = make_tiny(
        grid={"target": TARGETS, "seed": "0..1"},
        ensembles=[{"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..1"}],
        set={"train.steps": 100, "train.eval_every": 20},
    )
    for task in plan.tasks:
        folder = RunFolder(task.folder(tmp_path))
        if task.config is None:
            made["make_ensemble"](folder.path, [tmp_path / name for name in task.needs])
        else:
            folder.path.mkdir()
            records = made["records"](task.config)
            folder.config_file.write_text(to_yaml(task.config))
            folder.rewrite_metrics([record.to_json() for record in records])
            folder.result_file.write_text(json.dumps(made["result_of"](task.config, records, "rotated-digits")))
        folder.model_file.write_bytes(b"a model")
    save_labels(plan.study.name, plan.labels, tmp_path)
    return plan, tmp_path


@pytest.mark.parametrize(("selection", "measure"), [("source", "test_accuracy"), ("mean", "mean_after_start")])
def test_table_and_sweep_table_agree_over_several_targets(measured: tuple[Plan, Path], selection: str, measure: str):
    plan, out = measured
    study = values(results(plan, out), measure)
    assert targets_of(study) == TARGETS
    rows = {row.method: row for row in aggregate(find_runs([out]).of("rotated-digits"), selection).rows}
    assert set(rows) == set(study) == ({"float", "lsq", "EoQ"} if selection == "source" else {"float", "lsq"})
    for method, by_condition in study.items():
        assert rows[method].cells[AVERAGE] == average_over_targets(by_condition, TARGETS)
        for target, cell in by_target(by_condition, TARGETS).items():
            assert rows[method].cells[target] == cell


def test_the_average_of_an_ensemble_is_that_of_its_files(measured: tuple[Plan, Path]):
    plan, out = measured
    table = values(results(plan, out), "test_accuracy")
    files = [json.loads(file.read_text()) for file in out.glob("eoq-*/result.json")]
    assert len(files) == 3
    mean = average_over_targets(table["EoQ"], TARGETS).mean
    assert mean == pytest.approx(sum(one["test_accuracy"] for one in files) / 3)


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
