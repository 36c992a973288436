"""Small studies on three domains of the embedded digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtdog.sweep.local import LocalEngine
from qtdog.sweep.plan import Plan, make_plan
from qtdog.sweep.study import Study

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


@pytest.fixture
def make_tiny() -> Callable[..., Plan]:
    """Return a function that makes the plan of a small study, with keys of the study file changed."""
    return lambda **changes: make_plan(tiny_study(**changes))


@pytest.fixture
def local() -> Callable[..., LocalEngine]:
    """Return a function that makes the engine of this machine for a plan."""

    def make(plan: Plan, out: Path, workers: int = 2) -> LocalEngine:
        return LocalEngine(out, plan.source, workers=workers, threads=1)

    return make
