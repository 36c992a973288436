"""`qtdog.sweep` and `qtdog.compare` on runs of the digits."""

from __future__ import annotations

from pathlib import Path

import pytest

import qtdog
from qtdog.core.errors import ConfigError

STUDY = """
name: tiny
base: {set: {data.image_size: 12, data.batch_size: 4, train.steps: 2, train.eval_every: 2}}
methods:
  float: {set: {quantizer.name: none}}
  lsq: {set: {quantizer.start_step: 1}}
grid: {target: ['75'], seed: [0, 1]}
"""


def test_a_study_runs_and_its_table_compares_by_pairs(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(STUDY)
    study = qtdog.sweep(tmp_path / "tiny.yaml", out=tmp_path / "out", workers=1, progress=False)
    assert study.is_done
    assert "4 of 4 done" in repr(study)
    float_row, lsq = study.rows(reference="float")
    assert (float_row["method"], lsq["method"]) == ("float", "lsq")
    assert lsq["pairs"] == 2
    assert lsq["difference"] == pytest.approx(lsq["75"] - float_row["75"])
    assert list(study.table()["method"]) == ["float", "lsq"]
    with pytest.raises(ConfigError, match="did you mean 'float'"):
        study.table(reference="flaot")

    table = qtdog.compare(tmp_path / "out")
    assert sorted(table["75"]) == pytest.approx(sorted([float_row["75"], lsq["75"]]))
    assert list(table["trials"]) == [2, 2]
    with pytest.raises(ConfigError, match="sourc"):
        qtdog.compare([tmp_path / "out"], selection="sourc")
