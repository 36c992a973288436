from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import qtdog

PAGE = Path(__file__).parents[2] / "docs/tasks/after-training.md"


def test_the_program_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    program = PAGE.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(program, PAGE.name, "exec"), names)
    assert "LayerCalibration(" in capsys.readouterr().out
    shipped = qtdog.load_into("model.safetensors", timm.create_model("mobilenetv3_small_050", num_classes=7))
    images = names["batches"][0]
    assert torch.equal(shipped(images), names["model"].eval()(images))
