"""`benchmarks/peers_int8.py` at a small scale."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/peers_int8.py"


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that compares tools on a small network and returns the rows by name."""

    def run(*tools: str) -> dict[str, dict[str, Any]]:
        out = tmp_path / "rows.json"
        words = ["--backbones", "test_resnet", "--sizes", "32", "--rounds", "2", "--calls", "1"]
        words += ["--num-calibration", "8", "--json", str(out), "--tools", *tools]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return {row["name"]: row for row in json.loads(out.read_text())}

    return run


@pytest.mark.stress
@pytest.mark.usefixtures("one_registry")
def test_ours_and_that_of_onnxruntime_are_beside_float_in_the_same_runtime(rows: Any):
    found = rows("qtdog", "onnxruntime")
    assert set(found) == {
        "float, onnxruntime", "float, OpenVINO", "qtdog, onnxruntime", "qtdog, OpenVINO", "onnxruntime, onnxruntime",
    }  # fmt: skip
    assert found["float, OpenVINO"]["cpu"]["median"] == 1
    assert found["float, OpenVINO"]["logit_error"] == 0
    for name in ("qtdog, onnxruntime", "qtdog, OpenVINO", "onnxruntime, onnxruntime"):
        assert found[name]["n_bytes"] < 0.5 * found["float, onnxruntime"]["n_bytes"]
        assert 0 < found[name]["logit_error"] < 0.5
        assert found[name]["cpu"]["median"] > 0


@pytest.mark.usefixtures("one_registry")
@pytest.mark.filterwarnings("ignore")
def test_that_of_nncf_runs_in_openvino(rows: Any):
    pytest.importorskip("nncf", reason="pip install nncf")
    found = rows("nncf")
    assert set(found) == {"float, onnxruntime", "float, OpenVINO", "nncf, OpenVINO"}
    assert 0 < found["nncf, OpenVINO"]["logit_error"] < 0.5


def test_the_error_of_logits_leaves_out_what_is_the_same_for_all_images():
    error = runpy.run_path(str(SCRIPT))["relative_error"]
    logits = np.array([[0.0, 1.0], [2.0, 5.0]])
    assert error(logits + 7, logits) == 0
    assert error(1.5 * logits, logits) == pytest.approx(0.5)
