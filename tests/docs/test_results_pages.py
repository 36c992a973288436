"""Tables of the results pages are what their commands print from the records in the repository."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def test_the_tables_of_shifts_are_what_their_command_prints(capsys: pytest.CaptureFixture[str]):
    scores = runpy.run_path(str(ROOT / "benchmarks" / "shift_scores.py"))
    runs = list(json.loads((RESULTS / "runs" / "shift-office.json").read_text()).values())
    scores["tables"](runs, "float")
    assert capsys.readouterr().out in (RESULTS / "shift.md").read_text()
    on_pacs = list(json.loads((RESULTS / "runs" / "shift-pacs-short.json").read_text()).values())
    scores["tables"](on_pacs, "float")
    assert capsys.readouterr().out in (RESULTS / "shift.md").read_text()
    scores["tables"](runs, "float, sma")
    robust = capsys.readouterr().out.splitlines()[-1]
    assert "noise of 3 steps" in robust
    assert "−8.8" in robust
