"""The script for owners of a GPU, tried without one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support import load_script


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load_script("benchmarks/gpu_check.py")


def test_losses_are_those_of_a_run(check: ModuleType):
    losses = check.losses_of(check.digits_config(), 3)
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert abs(losses[0] - math.log(10)) < 0.5  # ten classes, random weights


def test_a_parameter_elsewhere_fails_the_check(check: ModuleType):
    parts = check.build_components(check.digits_config(), check.RotatedDigits())
    check.check_places(parts)
    parts.network.classifier.bias = torch.nn.Parameter(parts.network.classifier.bias.to("meta"))
    with pytest.raises(check.Failed, match=r"classifier.bias of Network is on meta, not on cpu"):
        check.check_places(parts)


def test_batches_ahead_and_compiled_updates_are_those_of_the_cpu(check: ModuleType):
    same = {"largest_levels": 0.0, "mean_levels": 0.0}
    assert check.ahead() == {"batches": 20, "levels_of_255_off_the_cpu": {"none": same, "domainbed": same}}
    found = check.compiled()
    assert found["backend"] == "aot_eager"
    assert found["largest_difference"] < 1e-4


def test_every_member_has_a_run(check: ModuleType):
    labels = [label for label, _ in check.members()]
    assert len(set(labels)) == len(labels)
    assert {"objective arm", "quantizer inq", "averager swad", "step rule sam"} <= set(labels)
    for _, changes in check.members():
        check.digits_config(changes)


def test_a_part_that_fails_is_written_down_and_the_others_go_on(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken() -> dict[str, object]:
        raise check.Failed("no driver")

    monkeypatch.setitem(check.PARTS, "demo", broken)
    report = check.run_parts(["demo", "machine"], tmp_path / "g.json")
    assert report["demo"]["failed"] == "no driver"
    assert json.loads((tmp_path / "g.json").read_text())["machine"]["torch"] == torch.__version__
