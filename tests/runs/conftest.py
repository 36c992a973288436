"""Made-up runs, as in the tests of reports, and a few real ones."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MADE = runpy.run_path(str(Path(__file__).parents[1] / "report" / "made_runs.py"))


@pytest.fixture(scope="session")
def made() -> dict[str, Any]:
    """The functions of `made_runs.py` by name."""
    return MADE


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return MADE["make_run"]


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 27 runs and an ensemble, not to be changed."""
    return MADE["make_study"](tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def domainbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results.jsonl, not to be changed."""
    return MADE["make_domainbed"](tmp_path_factory.mktemp("domainbed") / "results.jsonl")
