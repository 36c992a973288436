"""Small studies on three domains of the embedded digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qtdog.runs.folder import RunFolder
from qtdog.sweep.journal import Outcome
from qtdog.sweep.local import LocalEngine, Resources, run_task
from qtdog.sweep.plan import Plan, Task, make_plan
from qtdog.sweep.runner import SweepProgress as Progress
from qtdog.sweep.study import Study
from qtdog.training.run import RunCallbacks

TINY = {
    "data.image_size": 8,
    "data.batch_size": 2,
    "train.steps": 6,
    "train.eval_every": 2,
    "train.checkpoint_every": 1,
}


def tiny_study(**changes: Any) -> Study:
    """Return a study of two methods, one target and two seeds, six steps each, with keys changed."""
    base = {"presets": ["digits"], "set": TINY | changes.pop("set", {})}
    tree = {
        "name": "tiny",
        "base": base,
        "methods": {"float": {"presets": ["float"]}, "lsq": {"presets": ["lsq"]}},
        "grid": {"target": "75", "seed": "0..1"},
    }
    return Study.model_validate(tree | changes)


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Plan]:
    """Return a function that makes the plan of a small study, with keys of the study file changed."""
    return lambda **changes: make_plan(tiny_study(**changes))


@pytest.fixture
def local() -> Callable[..., LocalEngine]:
    """Return a function that makes the engine of this machine for a plan."""

    def make(plan: Plan, out: Path, workers: int = 2) -> LocalEngine:
        return LocalEngine(out, plan.source, Resources(workers, 1))

    return make


class Quiet:
    """A display that keeps the outcomes."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, Outcome]] = []

    def show(self, progress: Progress) -> None:
        """Do nothing."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Keep it."""
        self.ends.append((task.name, outcome))


def measured(out: Path, plan: Plan) -> dict[str, Any]:
    """Return what each run came to, without what time decides."""
    found = {}
    for task in plan.tasks:
        if task.kind == "run":
            folder = RunFolder(task.folder(out))
            lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
            result = folder.read_result()
            assert result is not None
            found[task.name] = (result["model_sha256"], [line | {"trained_s": 0} for line in lines])
    return found


def in_this_process(plan: Plan, out: Path) -> Path:
    """Do every task of a plan here and now."""
    for task in plan.tasks:
        outcome = run_task(task, out, plan.dataset, RunCallbacks(warn=print))
        assert outcome.status == "done", outcome
    return out


@pytest.fixture(scope="session")
def running() -> SimpleNamespace:
    """Return what runs small sweeps and looks at what came of them: Quiet, measured, in_this_process."""
    return SimpleNamespace(Quiet=Quiet, measured=measured, in_this_process=in_this_process)
