"""Tables of studies on the results pages are what `qtdog sweep table` makes of the records in the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qtdog.cli.sweep_output import study_table
from qtdog.report.render import to_markdown
from qtdog.sweep.plan import make_plan
from qtdog.sweep.results import read_earlier, results, values
from qtdog.sweep.study import read_study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
DATA = Path(os.environ.get("QTDOG_DATA") or ROOT.parent / "shared" / "data")
BOTH = ("test_accuracy", "source_accuracy")

# study, record, data, reference, page, what the page shows of it
TABLES = [
    ("recipe-office", "recipe-office", "office_caltech10", "lsq+sma", "recipe", BOTH),
    ("small-networks", "small-networks", "office_caltech10", "lite0-lsq-7+sma", "recipe", BOTH),
    ("soup-office", "soup-office", "office_caltech10", "lsq+sma", "recipe", BOTH),
    ("recipe-pacs-short", "recipe-pacs-short", "pacs", "lsq+sma", "recipe", BOTH),
    ("probe-office", "probe-office", "office_caltech10", "lsq+sma", "recipe", BOTH),
    ("label-noise-office", "label-noise-office", "office_caltech10", "float", "study", ("test_accuracy",)),
    ("controls-office", "controls-office", "office_caltech10", "float", "study", BOTH),
    ("controls-pacs-short", "controls-pacs-short", "pacs", "float", "study", BOTH),
]


@pytest.mark.parametrize(("study", "record", "data", "reference", "page", "measures"), TABLES)
def test_every_row_of_a_study_is_what_its_record_says(study, record, data, reference, page, measures, tmp_path):
    if not (DATA / data).is_dir():
        pytest.skip(f"{data} is not in {DATA}; set QTDOG_DATA to its parent")
    plan = make_plan(read_study(ROOT / "studies" / f"{study}.yaml"), str(DATA / data))
    finished = results(plan, tmp_path, read_earlier([RESULTS / "runs" / f"{record}.json"]))
    lines = (RESULTS / f"{page}.md").read_text().splitlines()
    for measure in measures:
        table = to_markdown([study_table(values(finished, measure), reference, "")])
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) >= 4, "no method of the study is in the record"
        assert [row for row in rows if row not in lines] == []
