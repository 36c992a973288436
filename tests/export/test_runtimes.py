import dataclasses
import sys
from typing import Any

import numpy as np
import pytest

from qtdog.core.errors import ConfigError, FormatError, ModelError
from qtdog.export.formats import FORMATS, format_for
from qtdog.export.packed_source import library
from qtdog.export.parity import FLOAT, INTEGER, Parity
from qtdog.export.runtimes import open_runtime


def parity(**changes: Any) -> Parity:
    same = Parity(
        n_images=1000,
        domains=("a",),
        agreement_frac=1.0,
        max_difference={"logits": 0.0},
        rms_difference=0.0,
        largest_logit=10.0,
        accuracy_packed=0.9,
        accuracy_exported=0.9,
        n_lost=0,
        n_gained=0,
    )
    return dataclasses.replace(same, **changes)


def test_limits_let_pass_what_is_alike_and_name_what_is_not():
    assert parity().problems(FLOAT) == parity().problems(INTEGER) == []
    assert "same class on 99.80%" in parity(agreement_frac=0.998).problems(FLOAT)[0]
    assert parity(max_difference={"logits": 0.9e-3}).problems(FLOAT) == []
    assert "a logit is off by 0.0011" in parity(max_difference={"logits": 1.1e-3}).problems(FLOAT)[0]
    assert parity(max_difference={"logits": float("nan")}).problems(FLOAT)


def test_a_loss_of_accuracy_counts_beyond_chance():
    # 20 images lost and none gained: 2 points, with a standard error of 0.45
    lost = parity(accuracy_exported=0.88, n_lost=20, n_gained=0)
    assert "2.00 points of accuracy lost" in lost.problems(INTEGER)[0]
    # the same loss among 400 images that changed sides is chance
    assert parity(accuracy_exported=0.88, n_lost=210, n_gained=190).problems(INTEGER) == []


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "openvino", "onnxscript.optimizer"])
def test_a_missing_library_names_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    extra = "openvino" if name == "openvino" else "onnx"
    with pytest.raises(ModelError, match=rf"pip install 'qtdog\[{extra}\]'"):
        library(name)


def test_formats_are_known_by_name_and_suffix(tmp_path):
    with pytest.raises(ConfigError, match="unknown export format 'onxx'; did you mean 'onnx'"):
        FORMATS["onxx"]
    with pytest.raises(ConfigError, match=r"ends in \.xml"):
        format_for("openvino", tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="which format"):
        format_for(None, tmp_path / "m.bin")


def test_files_that_are_none_are_refused_with_a_reason(tmp_path, packed):
    for name in ("m.onnx", "m.xml", "m.pt2", "m.safetensors"):
        path = tmp_path / name
        with pytest.raises(FormatError, match="does not exist"):
            open_runtime(path)
        path.write_bytes(b"\x08\x07not a model")
        with pytest.raises(FormatError, match=name):
            open_runtime(path)
    with pytest.raises(FormatError, match="ends in one of"):
        open_runtime(tmp_path / "m.tflite")
    with pytest.raises(ConfigError, match="unknown runtime 'onnx'; did you mean 'onnxruntime'"):
        open_runtime(tmp_path / "m.onnx", runtime="onnx")
    with pytest.raises(ConfigError, match="torch cannot open"):
        open_runtime(tmp_path / "m.onnx", runtime="torch")
    model = open_runtime(packed("test_resnet"))
    with pytest.raises(ConfigError, match="takes uint8 images n × 32 × 32 × 3"):
        model(np.zeros((1, 3, 32, 32), dtype=np.uint8))


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_what_a_runtime_cannot_run_is_a_model_error(name, exported):
    model = open_runtime(exported("digits_cnn", name).path)
    with pytest.raises(ModelError, match=r"cannot run in .* on 1 images of 8 × 8: "):
        model.run(np.zeros((1, 8, 8, 3), dtype=np.uint8))
