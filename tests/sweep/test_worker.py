"""A sweep over a folder with a corrupt image: refused, or left out and recorded."""

from __future__ import annotations

import json
import os

import pytest

from qtdog.core.errors import ConfigError
from qtdog.data.open import open_any
from qtdog.runs.folder import RunFolder
from qtdog.sweep.plan import make_plan
from qtdog.sweep.runner import check_tasks
from qtdog.sweep.study import Study
from qtdog.sweep.worker import run_task, run_task_from_json
from qtdog.training.run import RunCallbacks

SETTINGS = {
    "data.image_size": 8,
    "data.batch_size": 2,
    "model.backbone": "digits_cnn",
    "train.steps": 4,
    "train.eval_every": 2,
}
BROKEN = "night/cat/3.png"


@pytest.fixture
def photos(image_tree):
    os.truncate(image_tree / BROKEN, 70)
    return image_tree


def study(**changes):
    tree = {
        "name": "photos",
        "base": {"presets": ["digits"], "set": SETTINGS | changes.pop("set", {})},
        "methods": {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"], "set": {"quantizer.start_step": 2}}},
        "grid": {"target": "outdoor", "seed": "0..1"},
        "ensembles": [{"name": "EoQ", "method": "lsq", "kind": "eoq", "members": "0..1"}],
    }
    return Study.model_validate(tree | changes)


def test_a_corrupt_image_is_named_before_anything_starts(photos):
    plan = make_plan(study(), str(photos))
    with pytest.raises(ConfigError, match=r"3\.png cannot be read as an image .* data\.skip_unreadable: true"):
        check_tasks(plan.tasks, plan.dataset)


def test_all_tasks_go_on_without_it_and_their_results_tell(photos, tmp_path):
    plan, out = make_plan(study(set={"data.skip_unreadable": True}), str(photos)), tmp_path / "out"
    assert [key for key, _ in plan.dataset.skipped] == [BROKEN]
    check_tasks(plan.tasks, plan.dataset)
    for task in plan.tasks:
        outcome = run_task(task, out, open_any(str(photos)), RunCallbacks())
        assert outcome.status == "done", outcome
    runs = [RunFolder(task.folder(out)) for task in plan.tasks if task.kind == "run"]
    assert len(runs) == 4
    for folder in runs:
        result = folder.read_result()
        assert result is not None
        assert result["n_skipped"] == 1
        assert [row["image"] for row in json.loads((folder.path / "skipped.json").read_text())] == [BROKEN]


def test_a_task_that_is_sent_elsewhere_leaves_it_out_too(photos, tmp_path):
    plan = make_plan(study(set={"data.skip_unreadable": True}, ensembles=[]), str(photos))
    answer = run_task_from_json(plan.tasks[0].to_json(), str(tmp_path), str(photos), 1)
    assert answer["status"] == "done", answer["reason"]


def test_one_method_that_leaves_it_out_decides_for_all(photos):
    methods = {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"], "set": {"data.skip_unreadable": True}}}
    plan = make_plan(study(methods=methods, ensembles=[]), str(photos))
    assert all(task.config is not None and task.config.data.skip_unreadable for task in plan.tasks)
    check_tasks(plan.tasks, plan.dataset)
