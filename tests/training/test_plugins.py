"""Plug-ins: members from outside, named by the user, part of the configuration, never run by a received folder."""

# attributes of modules and options that are not there are what is tested
# pyright: reportArgumentType=false

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtdog
from qtdog.core.config import Config, config_hash
from qtdog.core.config_io import load_preset, preset_plugins
from qtdog.core.errors import ConfigError, FormatError, ModelError, RunError
from qtdog.core.progress import StopAfter
from qtdog.sweep.local import run_task
from qtdog.sweep.plan import Task, make_plan
from qtdog.sweep.study import read_study
from qtdog.training.load_model import ModelInfo
from qtdog.training.plugins import AXES, forget_plugins, load_entry_points, load_plugins, member_origins
from qtdog.training.run import RunCallbacks

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
    from qtdog.models.network import OWN_BACKBONES

    del OWN_BACKBONES._members["tiny-mean"]
    with pytest.raises(ModelError, match=r"unknown backbone 'tiny-mean'.*plugins=\['FILE\.py'\]"):
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


def test_a_study_takes_the_text_of_its_plugins_to_its_workers(tmp_path: Path):
    file = write(tmp_path, "study-loss")
    (tmp_path / "study.yaml").write_text(
        "name: own\nplugins: [study_loss.py]\n"
        "base: {set: {data.image_size: 12, data.batch_size: 4, train.steps: 2, train.eval_every: 2}}\n"
        "methods: {mine: {set: {objective.name: study-loss, quantizer.name: none}}}\ngrid: {target: ['75']}\n"
    )
    plan = make_plan(read_study(tmp_path / "study.yaml"))
    (task,) = plan.tasks
    assert Task.from_json(task.to_json()) == task
    assert task.config is not None
    assert task.config.plugins.files == (str(file),)
    text = file.read_text()
    file.unlink()  # what is sent is its text
    assert task.to_json()["plugins"] == [[str(file), text]]


STUDY = """
name: own
base: {set: {data.image_size: 12, data.batch_size: 4, train.steps: 2, train.eval_every: 2}}
methods: {mine: {set: {objective.name: study-loss, quantizer.name: none}}}
grid: {target: ['75']}
"""


def test_what_a_notebook_registers_is_refused_before_a_sweep_starts(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(STUDY)
    file = write(tmp_path, "study-loss")
    namespace: dict[str, Any] = {"__name__": "notebook"}
    exec(file.read_text(), namespace)  # as a cell does
    with pytest.raises(ConfigError, match=r"objective 'study-loss' was registered in Python.*plugins=\['FILE\.py'\]"):
        qtdog.sweep(tmp_path / "study.yaml", out=tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists()
    for _ in range(2):
        study = read_study(tmp_path / "study.yaml").model_copy(update={"plugins": [str(file)]})
        (task,) = make_plan(study).tasks  # the remedy, also where the cell has run again since
        assert [path for path, _ in task.plugins] == [str(file)]
        assert task.config is not None
        assert task.config.plugins.files == (str(file),)
        exec(file.read_text(), namespace)
    forget_plugins()
    load_plugins([file])  # in the notebook, not named in the study
    assert [path for path, _ in make_plan(read_study(tmp_path / "study.yaml")).tasks[0].plugins] == [str(file)]


def test_an_earlier_version_of_a_plugin_is_run_again(tmp_path: Path):
    first, second = write(tmp_path, "versions").read_text(), LOSS.format(name="versions", factor=3.0)
    objectives = AXES["objective"]
    found = []
    for text in (first, second, first):
        file = tmp_path / "versions.py"
        file.write_text(text)
        load_plugins([file])
        found.append(objectives["versions"])
    constants = [one.loss.__code__.co_consts for one in found]
    assert constants[0] == constants[2] != constants[1]


def test_a_preset_file_names_plugins_beside_it(tmp_path: Path):
    file = write(tmp_path, "beside")
    preset = tmp_path / "mine.yaml"
    preset.write_text("plugins: [beside.py]\nobjective: {name: beside}\n")
    assert preset_plugins(str(preset)) == [str(file)]
    assert load_preset(str(preset)) == {"objective": {"name": "beside"}}


ALL = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import qtdog
from qtdog.quantizers.base import encode


@qtdog.register("objective", "own-loss")
class Loss(qtdog.Objective):
    def loss(self, domains):
        return torch.stack([cross_entropy(domain.logits, domain.labels) for domain in domains]).max()


@qtdog.register("quantizer", "own-grid")
class Grid(qtdog.Quantizer):
    "Rounded to steps of the largest weight."

    def __init__(self, weight, spec, options=None):
        super().__init__(spec)

    def enable_(self, weight):
        self.enabled = True

    def scale(self, weight):
        return self.spec.rows(weight.detach()).abs().amax(1).clamp(min=1e-6) / self.spec.qmax

    def forward(self, weight):
        if not self.enabled:
            return weight
        return weight + (encode(weight, self.scale(weight), self.spec).dequantize() - weight).detach()

    def quantized(self, weight):
        return encode(weight, self.scale(weight), self.spec)


@qtdog.register("averager", "own-mean")
class Mean(qtdog.Averager):
    def __init__(self, params, start):
        super().__init__(params, start)
        self.mean = None

    def after_step(self, step, network):
        now = {name: value.detach().clone() for name, value in network.state_dict().items()
               if value.is_floating_point()}
        self.mean = now if self.mean is None else {name: self.mean[name].lerp(now[name], 0.5) for name in now}

    def evaluated(self):
        return self.mean

    def state(self):
        return dict(self.mean or {}), {}

    def restore(self, tensors, extra):
        self.mean = dict(tensors) or None


@qtdog.register("step-rule", "own-clip")
class Clip(qtdog.StepRule):
    def __call__(self, update):
        update.optimizer.zero_grad()
        loss = update.backward()
        nn.utils.clip_grad_norm_(update.network.parameters(), 1.0)
        update.optimizer.step()
        return loss


class Scaled(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside, self.gain = inside, nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.inside(images) * self.gain


@qtdog.register("feature-layer", "own-gain")
class Gain(qtdog.FeatureLayer):
    SAVED = True

    def install_(self, network, image_shape):
        network.featurizer = Scaled(network.featurizer)


@qtdog.register("augmentation", "own-flip")
def flip(images, generator):
    mask = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mask[:, None, None, None], images.flip(2), images)


@qtdog.register("backbone", "own-net")
def net(channels, image_size):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


@qtdog.register("dataset", "own-data")
def data():
    pixels = torch.randint(0, 255, (60, 12, 12, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = [i % 2 for i in range(60)]
    return qtdog.Dataset(list(pixels.numpy()), [i // 20 for i in range(60)], labels=labels, classes=["a", "b"],
                         name="own")
"""
OWN: dict[str, Any] = {
    "data": "own-data", "target": "2", "objective": "own-loss", "quantizer": "own-grid", "averager": "own-mean",
    "step_rule": "own-clip", "feature_layer": "own-gain", "augment": "own-flip", "backbone": "own-net",
    "weights": "none", "start_step": 2, "checkpoint_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def all_axes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, qtdog.RunResult]:
    """Return a file with a member of every axis, and a run that uses all of them."""
    folder = tmp_path_factory.mktemp("all")
    file = folder / "all_axes.py"
    file.write_text(ALL)
    result = qtdog.train(out=folder / "run", plugins=[file], **OWN | SMALL)
    assert isinstance(result, qtdog.RunResult)
    return file, result


@pytest.fixture
def anew() -> Any:
    """Return a function that begins a process anew, as far as plug-ins go; the file is needed again after it."""
    yield forget_plugins
    forget_plugins()


def test_a_member_of_every_axis_trains_and_its_model_answers(all_axes: tuple[Path, qtdog.RunResult]):
    file, result = all_axes
    assert set(AXES) == {axis for axis, _ in member_origins()}
    assert result.config.plugins.files == (str(file),)
    info = result.model.info
    assert isinstance(info, ModelInfo)
    assert info.feature_layer == "own-gain"
    scores = result.model.evaluate("own-data", progress=False)
    assert scores.domains["2"]["accuracy"] == result.accuracy


def test_a_resume_a_fork_and_a_sweep_with_plugins_are_bit_identical(
    all_axes: tuple[Path, qtdog.RunResult], tmp_path: Path
):
    file, whole = all_axes
    given = {"plugins": [file], **OWN, **SMALL}
    with pytest.raises(KeyboardInterrupt, match="stopped after 3"):
        qtdog.train(out=tmp_path / "part", **given | {"progress": StopAfter(3)})
    part = qtdog.train(out=tmp_path / "part", resume=True, **given)
    forked = qtdog.train(out=tmp_path / "fork", members=2, fork_at="start", **given)
    assert isinstance(forked, qtdog.RunResults)

    (tmp_path / "study.yaml").write_text(
        f"name: own\nplugins: [{file}]\ndata: own-data\n"
        "base: {set: {data.image_size: 12, data.batch_size: 4, train.steps: 4, train.eval_every: 2, "
        "train.checkpoint_every: 1, model.backbone: own-net, model.weights: none, model.feature_layer: own-gain, "
        "data.augment: own-flip, objective.name: own-loss, averager.name: own-mean, step_rule.name: own-clip, "
        "quantizer.name: own-grid, quantizer.start_step: 2}}\n"
        "methods: {mine: {}}\ngrid: {target: ['2'], seed: [0]}\n"
    )
    plan = make_plan(read_study(tmp_path / "study.yaml"))
    (task,) = plan.tasks
    assert task.name == config_hash(whole.config)
    run_task(task, tmp_path / "sweep", plan.dataset, RunCallbacks())
    swept = qtdog.RunResult.read(tmp_path / "sweep" / task.name)
    for other in (part, forked[0], swept):
        assert isinstance(other, qtdog.RunResult)
        assert other.result["model_sha256"] == whole.result["model_sha256"]


def test_a_model_names_its_plugin_when_it_is_loaded_without_it(
    all_axes: tuple[Path, qtdog.RunResult], tmp_path: Path, anew: Any
):
    file, result = all_axes
    info = result.model.info
    assert isinstance(info, ModelInfo)
    assert [(one.name, one.sha256) for one in info.plugins] == [
        ("all_axes.py", hashlib.sha256(ALL.encode()).hexdigest())
    ]
    anew()
    file.with_name("all_axes.py.txt").write_text(file.read_text())  # nothing is found by its name either
    for text in (
        "feature layer that is not known here",
        r"made with all_axes\.py \([0-9a-f]{12}\)",
        "name it: qtdog.load_plugins",
    ):
        with pytest.raises(FormatError, match=text):
            qtdog.load(result.folder)
    assert member_origins() == {}  # the copy in the run folder was not run

    changed = tmp_path / "all_axes.py"
    changed.write_text(ALL + "\n# another text\n")
    load_plugins([changed])
    with pytest.warns(UserWarning, match="another version of the plug-in of backbone 'own-net'"):
        qtdog.load(result.folder)
    anew()
    load_plugins([file])
    qtdog.load(result.folder)


class Point:
    """An entry point as importlib.metadata has them."""

    name, module, value, dist = "mine", "installed_plugin_of_a_test", "installed_plugin_of_a_test", None

    def load(self) -> Any:
        """Import the module."""
        return importlib.import_module(self.module)


def test_an_installed_package_offers_plugins_as_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: Any
):
    (tmp_path / "installed_plugin_of_a_test.py").write_text(LOSS.format(name="installed-loss", factor=1.0))
    monkeypatch.syspath_prepend(str(tmp_path))
    anew()
    load_entry_points(points=[Point()])
    result = qtdog.train(target="75", objective="installed-loss", out=tmp_path / "run", **SMALL)
    assert isinstance(result, qtdog.RunResult)
    assert result.config.plugins.files == ("installed_plugin_of_a_test",)
    sys.modules.pop("installed_plugin_of_a_test")

    (tmp_path / "installed_plugin_of_a_test.py").write_text("raise ValueError('broken')")
    with pytest.raises(ConfigError, match=r"the plug-in of package installed_plugin_of_a_test failed: ValueError"):
        load_entry_points(points=[Point()])


def test_a_failing_task_of_a_sweep_names_the_plugin_and_its_line(tmp_path: Path):
    (tmp_path / "bad_loss.py").write_text(
        "import qtdog\n@qtdog.register('objective', 'bad-loss')\nclass Bad(qtdog.Objective):\n    'x'\n"
        "    def loss(self, domains):\n        return domains[0].no_such_field\n"
    )
    (tmp_path / "study.yaml").write_text(
        "name: own\nplugins: [bad_loss.py]\nbase: {set: {data.image_size: 12, train.steps: 2, train.eval_every: 2}}\n"
        "methods: {mine: {set: {objective.name: bad-loss}}}\ngrid: {target: ['75']}\n"
    )
    plan = make_plan(read_study(tmp_path / "study.yaml"))
    outcome = run_task(plan.tasks[0], tmp_path / "out", plan.dataset, RunCallbacks())
    assert outcome.reason.startswith("plug-in bad_loss.py, line 6: AttributeError: ")
