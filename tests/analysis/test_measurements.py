"""What is measured is kept: rows that a crash cut off, other settings, numbers that read back exactly."""

import json
import math
from pathlib import Path

import pytest

from qtdog.analysis.measurements import AnalysisResult, Measurements, curve_style, write_result
from qtdog.core.errors import FormatError, RunError


def open_points(folder: Path, **settings: int) -> Measurements:
    return Measurements(folder, ["run", "gamma"], ["loss"], settings or {"seed": 0})


def test_a_row_that_was_cut_off_is_measured_again_and_the_file_ends_the_same(tmp_path: Path):
    points = open_points(tmp_path)
    for gamma in (0.1, 0.2, 0.30000000000000004):
        points.add_(("a,b", gamma), (gamma / 3,))
    whole = points.file.read_bytes()
    points.file.write_bytes(whole[:-4])
    again = open_points(tmp_path)
    assert ("a,b", 0.2) in again
    assert ("a,b", 0.30000000000000004) not in again
    again.add_(("a,b", 0.30000000000000004), (0.30000000000000004 / 3,))
    assert again.file.read_bytes() == whole
    assert float(open_points(tmp_path).of(run="a,b", gamma=0.2)[0]["loss"]) == 0.2 / 3


def test_other_settings_are_refused_and_each_difference_is_named(tmp_path: Path):
    open_points(tmp_path, seed=0, n_images=5)
    with pytest.raises(RunError, match="seed: 0 → 1") as found:
        open_points(tmp_path, seed=1, n_images=5)
    assert "n_images" not in str(found.value)
    with pytest.raises(FormatError, match="other columns"):
        Measurements(tmp_path, ["run"], ["loss"], {"seed": 0, "n_images": 5})


def test_an_outcome_is_valid_json_and_its_table_keeps_what_json_cannot(tmp_path: Path):
    rows = [{"run": "a", "loss": math.inf}, {"run": "b", "loss": None}]
    write_result(tmp_path, AnalysisResult("flatness", "F", {"radii": (1.0,)}, [], rows, ["f.png"]))
    said = json.loads((tmp_path / "analysis.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert said["kind"] == "flatness"
    assert [row["loss"] for row in said["numbers"]] == [None, None]
    assert (tmp_path / "flatness.csv").read_text() == "run,loss\na,inf\nb,\n"


def test_sixteen_curves_look_different():
    assert len({tuple(curve_style(n).values()) for n in range(16)}) == 16
