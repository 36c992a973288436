"""Plug-ins: members from outside, named by the user, part of the configuration, never run by a received folder."""

# attributes of modules and options that are not there are what is tested
# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtdog
from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import load_preset, preset_plugins
from qtdog.core.errors import ConfigError, ModelError, RunError
from qtdog.core.progress import StopAfter
from qtdog.runs.folder import RunFolder
from qtdog.sweep.local import LocalEngine, Resources
from qtdog.sweep.plan import Task, make_plan
from qtdog.sweep.runner import is_done
from qtdog.sweep.study import read_study
from qtdog.training.plugins import load_plugins

SMALL: dict[str, Any] = {"steps": 4, "batch_size": 4, "image_size": 12, "eval_every": 2, "progress": False}
LOSS = """
import qtdog
from torch.nn.functional import cross_entropy

@qtdog.register("objective", "{name}")
class MaxMin(qtdog.Objective):
    '''The largest loss of any domain.'''
    MIN_DOMAINS = 2

    def loss(self, domains):
        losses = [cross_entropy(domain.logits, domain.labels) for domain in domains]
        return max(losses) * {factor}
"""


def write(folder: Path, name: str, factor: float = 1.0) -> Path:
    file = folder / f"{name.replace('-', '_')}.py"
    file.write_text(LOSS.format(name=name, factor=factor))
    return file


def test_a_loss_of_ones_own_trains_resumes_and_is_part_of_the_hash(tmp_path: Path):
    file = write(tmp_path, "max-min")
    given: dict[str, Any] = {"target": "75", "objective": "max-min", "plugins": [file]}
    whole = qtdog.train(out=tmp_path / "whole", **given | SMALL)
    assert isinstance(whole, qtdog.RunResult)
    plain = whole.config.model_copy(update={"plugins": Config().plugins})
    assert config_hash(whole.config) != config_hash(plain)
    (copy,) = (tmp_path / "whole" / "plugins").iterdir()
    assert copy.read_text() == file.read_text()
    stopped = given | SMALL | {"progress": StopAfter(3)}
    with pytest.raises(KeyboardInterrupt, match="stopped after 3"):
        qtdog.train(out=tmp_path / "part", **stopped)
    part = qtdog.train(out=tmp_path / "part", resume=True, **given | SMALL)
    assert isinstance(part, qtdog.RunResult)
    assert part.result["model_sha256"] == whole.result["model_sha256"]

    write(tmp_path, "max-min", factor=2.0)
    with pytest.raises(ConfigError, match=r"max_min\.py changed since this configuration was made"):
        qtdog.train(out=tmp_path / "part", resume=True, plugins=[file], progress=False)
    with pytest.raises(RunError, match=r"plugins\.sha256"):
        qtdog.train(out=tmp_path / "part", **given | SMALL)


def test_a_received_folder_runs_no_code(tmp_path: Path):
    trap = tmp_path / "trap.py"
    trap.write_text("raise SystemExit('it was run')")
    folder = tmp_path / "received"
    folder.mkdir()
    config = Config.make("digits", data={"target": "75"}, plugins={"files": [str(trap)], "sha256": ["0" * 64]})
    config.save(folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"made with the plug-in .*trap\.py \(0{12}\); if you trust it, name it"):
        qtdog.train(out=folder, resume=True, progress=False)
    assert preset_plugins(str(folder / "config.yaml")) == []


def test_plain_python_registers_and_the_source_counts(tmp_path: Path):
    @qtdog.register("backbone", "tiny-mean")
    def tiny(channels: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, 6))

    @qtdog.register("augmentation", "invert")
    def invert(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return 255 - images

    own: dict[str, Any] = {"target": "75", "backbone": "tiny-mean", "weights": "none", "augment": "invert"}
    result = qtdog.train(out=tmp_path / "run", **own | SMALL)
    assert isinstance(result, qtdog.RunResult)
    assert len(result.config.plugins.sha256) == 2
    assert result.model.info.backbone == "tiny-mean"
    from qtdog.models.featurizers import OWN_BACKBONES

    del OWN_BACKBONES._members["tiny-mean"]
    with pytest.raises(ModelError, match=r"unknown backbone 'tiny-mean'.*--plugin FILE\.py"):
        qtdog.load(result.folder)


def test_mistakes_name_file_and_line(tmp_path: Path):
    file = tmp_path / "bad.py"
    file.write_text("x = 1\nraise ValueError('no')\n")
    with pytest.raises(ConfigError, match=r"plug-in .*bad\.py failed in line 2: ValueError"):
        load_plugins([file])
    file.write_text("def (:\n")
    with pytest.raises(ConfigError, match=r"failed in line 1: SyntaxError"):
        load_plugins([file])
    file.write_text("import qtdog\nqtdog.register('objective', 'erm')(object)\n")
    with pytest.raises(ConfigError, match="objective 'erm' is built in"):
        load_plugins([file])
    with pytest.raises(ConfigError, match="unknown axis of a plug-in 'objectiv'; did you mean 'objective'"):
        qtdog.register("objectiv", "x")
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_plugins([tmp_path / "missing.py"])


def test_a_study_takes_plugins_to_its_workers(tmp_path: Path):
    write(tmp_path, "study-loss")
    (tmp_path / "study.yaml").write_text(
        "name: own\nplugins: [study_loss.py]\n"
        "base: {set: {data.image_size: 12, data.batch_size: 4, train.steps: 2, train.eval_every: 2}}\n"
        "methods: {mine: {set: {objective.name: study-loss, quantizer.name: none}}}\ngrid: {target: ['75']}\n"
    )
    plan = make_plan(read_study(tmp_path / "study.yaml"))
    (task,) = plan.tasks
    assert Task.from_json(task.to_json()) == task
    assert task.config is not None
    assert task.config.plugins.files == (str(tmp_path / "study_loss.py"),)
    (tmp_path / "study_loss.py").unlink()  # what is sent is its text
    engine = LocalEngine(tmp_path / "out", plan.source, Resources(1, 1))
    engine.start(task)
    outcomes = []
    while not outcomes:
        outcomes = engine.poll(1)
    engine.close()
    assert [(one.status, one.reason) for one in outcomes] == [("done", "")]
    assert is_done(task, tmp_path / "out")
    assert RunFolder(tmp_path / "out" / task.name).read_result() is not None


def test_a_preset_file_names_plugins_beside_it(tmp_path: Path):
    file = write(tmp_path, "beside")
    preset = tmp_path / "mine.yaml"
    preset.write_text("plugins: [beside.py]\nobjective: {name: beside}\n")
    assert preset_plugins(str(preset)) == [str(file)]
    assert load_preset(str(preset)) == {"objective": {"name": "beside"}}
