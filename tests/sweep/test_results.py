"""Tables of a study over several targets: what `qtdog table` says of the same runs, to the last digit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtdog.core.config_io import to_yaml
from qtdog.runs.aggregate import AVERAGE, aggregate
from qtdog.runs.find import find_runs
from qtdog.runs.folder import RunFolder
from qtdog.runs.statistics import average_over_targets, by_target
from qtdog.sweep.journal import save_labels
from qtdog.sweep.plan import Plan
from qtdog.sweep.results import results, targets_of, values

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
