"""What the examples in docstrings find: a cache of their own, and for those that need them finished runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

# Modules whose examples start in a folder with `study.yaml` and its finished runs, `runs/float` and `runs/lsq`.
WITH_RUNS = {"qtdog.api.analyses", "qtdog.api.studies", "qtdog.api.trained_model", "qtdog.report.html"}
STUDY = """
name: example
base: {presets: [digits], set: {train.steps: 2, train.eval_every: 2, data.batch_size: 2, data.image_size: 12}}
methods: {float: {presets: [float]}, lsq: {presets: [lsq]}}
grid: {target: ['75']}
"""


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTDOG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study and its two runs of two steps, made in this process."""
    from qtdog.sweep.local import run_task
    from qtdog.sweep.plan import make_plan
    from qtdog.sweep.study import read_study
    from qtdog.training.run import RunCallbacks

    folder = tmp_path_factory.mktemp("examples")
    (folder / "study.yaml").write_text(STUDY)
    plan = make_plan(read_study(folder / "study.yaml"))
    for task in plan.tasks:
        made = run_task(task, folder / "runs" / "example", plan.dataset, RunCallbacks())
        assert made.status == "done", made.reason
        shutil.copytree(folder / "runs" / "example" / task.name, folder / "runs" / str(task.labels[0]["method"]))
    return folder


@pytest.fixture(autouse=True)
def _examples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(request.node.name.startswith(f"{name}.") for name in WITH_RUNS):
        monkeypatch.chdir(request.getfixturevalue("finished_runs"))
